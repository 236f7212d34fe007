"""One GRPO run with speculation and the same one without: equal answers and rewards at every step,
and what each rollout took.

    python -m benchmarks.equal_runs configs/quickstart.yaml steps=60 --json FILE --plot FILE.png

Both runs have the config's seed and the coupled rule, under which no draft changes what is sampled
or learned; the second one has no draft. A difference in any step's answers or rewards ends it with
exit code 1. Give it the machine alone: the runs go one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import measure
from benchmarks.options import open_results
from jspec import cli
from jspec.config import Config, load_config
from jspec.errors import InputError
from jspec.metrics import read_records
from jspec.output import Output, screen
from jspec.train import train

WITHOUT = ("draft.name=none", "draft.path=null", "draft.options=null")
SAME = ("reward", "length", "finished", "tokens")
"""What of a record must be equal, beside all answers."""
COMPILED = "compilations"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m benchmarks.equal_runs", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="such as configs/quickstart.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as steps=60")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw both runs there")
    args = parser.parse_intermixed_args(arguments)
    open_results(args)
    return args


def went(config: Config) -> list[dict[str, Any]]:
    """The records of a run, each with its answers."""
    if train(config):
        raise InputError("the run ended early; see what it says above")
    folder = Path(config.output_dir)
    records = list(read_records(folder / "metrics.jsonl"))
    for record in records:
        lines = (folder / "samples" / f"{record['step']:06d}.jsonl").read_text().splitlines()
        record["answers"] = [json.loads(line)["response"] for line in lines]
    return records


def compared(ours: list[dict], plain: list[dict]) -> list[dict[str, Any]]:
    """A row for each step. Steps that compiled are marked: their seconds are the compiler's."""
    return [{"step": a["step"], "reward": a["reward"],
             "same": a["answers"] == b["answers"] and all(a[name] == b[name] for name in SAME),
             "acceptance_length": a["acceptance_length"],
             "compiled": bool(a[COMPILED] or b[COMPILED]),
             "rollout_seconds": [r["seconds/rollout"] for r in (a, b)],
             "step_seconds": [r["seconds/step"] for r in (a, b)]}
            for a, b in zip(ours, plain, strict=True)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds without a draft over seconds with one, of the steps in which nothing was compiled:
    all together, and the median of the steps."""
    pairs = np.array([row["rollout_seconds"] for row in rows if not row["compiled"]] or [[1, 1]])
    steps = np.array([row["step_seconds"] for row in rows if not row["compiled"]] or [[1, 1]])
    return {"steps": len(rows), "same": sum(row["same"] for row in rows),
            "rollout_speedup": float(pairs[:, 1].sum() / pairs[:, 0].sum()),
            "median_speedup": float(np.median(pairs[:, 1] / pairs[:, 0])),
            "step_speedup": float(steps[:, 1].sum() / steps[:, 0].sum())}


def draw(rows: list[dict[str, Any]], title: str, written: Output) -> None:
    """Seconds of rollouts so far, of both runs, and the reward on an axis of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    measured = [row for row in rows if not row["compiled"]]
    for column, (name, color) in enumerate((("auto speculation", "C0"), ("no draft", "C3"))):
        total = list(itertools.accumulate(row["rollout_seconds"][column] for row in measured))
        axes.plot([row["step"] for row in measured], total, color=color, label=name)
    axes.set(xlabel="step", ylabel="seconds of rollouts so far", title=title)
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot([row["step"] for row in rows], [row["reward"] for row in rows], color="0.7", lw=1)
    right.set(ylabel="reward (gray)")
    written.save(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, 1 if the runs differ. Raises InputError for a user's mistake."""
    args = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="jspec-equal-") as folder:
        runs = []
        for name, more in (("auto", ()), ("plain", WITHOUT)):
            runs.append(went(load_config(args.config, [
                *args.overrides, "speculation.rule=coupled", *more,
                f"output_dir={folder}/{name}", "logging.samples=1000000"])))
    rows = compared(*runs)
    found = summary(rows)
    table = Table("steps", "equal", "rollout", "median of steps", "whole step",
                  title=f"{args.config}: seconds without a draft over seconds with auto")
    table.add_row(str(found["steps"]), str(found["same"]), *(f"{found[name]:.2f}x" for name in (
        "rollout_speedup", "median_speedup", "step_speedup")))
    screen().print(table)
    measure.write_json(args.json, measure.report(rows, overrides=args.overrides, **found))
    if args.plot:
        draw(rows, f"{Path(args.config).stem}: {found['rollout_speedup']:.2f}x", args.plot)
    return int(found["same"] < len(rows))


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
