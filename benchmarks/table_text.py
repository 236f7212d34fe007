"""What the documents' tables are made with: results, Markdown and how figures are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = Mapping[str, Any]


def result(name: str) -> Any:
    """What `benchmarks/results/NAME.json` says."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, ending with a line end."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def link(name: str, folder: str = "../benchmarks/results") -> str:
    """To the file that a figure is from."""
    return f"[`{name}.json`]({folder}/{name}.json)"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"
