"""What a logger is, what it is told of a run, and what all loggers share."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from jspec.run_files import Sample, read_samples

LONGEST_NAME = 240  # MLflow takes 250 characters
COLUMNS = ("sample", "source", "prompt", "response", "answer", "reward", "rewards", "length",
           "finished", "failed", "cycles", "accepted")
"""Of a table of samples; one that none of them has, as `source` where there is one alone, is left
out."""


@dataclasses.dataclass(frozen=True)
class RunCard:
    """What a logger is told of a run as a whole.

    Attributes:
      directory: the run's output_dir.
      project: what the run belongs to (MLflow: its experiment).
      name: of the run, for people.
      config: the value of each dotted key.
    """

    directory: Path
    project: str
    name: str
    config: Mapping[str, Any]

    def store(self, logger: str) -> Path:
        """A folder of the logger's own in the output_dir."""
        folder = self.directory / "loggers" / logger
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @functools.cached_property
    def id(self) -> str:
        """By which loggers know the run again when it is resumed: drawn once, and kept in the
        output_dir."""
        path = self.directory / "loggers" / "id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(4) + "\n")
        return path.read_text().strip()


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a logger is told of a step. Numbers that are not finite are null in the record, and
    missing here: no two loggers make the same of them.

    Attributes:
      time: when the step ended, in seconds since 1970.
      scalars: by name; a list's i-th number as NAME/i.
    """

    step: int
    time: float
    scalars: dict[str, float]
    samples: list[Sample]

    @staticmethod
    def of(record: Mapping[str, Any], directory: Path) -> Entry:
        """Of a record of metrics.jsonl, with the samples of its step."""
        time = datetime.datetime.fromisoformat(record["time"]).timestamp()
        return Entry(record["step"], time, _scalars(record), read_samples(directory,
                                                                          record["step"]))

    def plain(self) -> dict[str, float]:
        """The scalars, by names of letters, digits and _ - . / alone."""
        return dict(zip(plain_names(self.scalars), self.scalars.values(), strict=True))

    def columns(self) -> list[str]:
        """Those of `COLUMNS` that there are."""
        return [column for column in COLUMNS if any(column in sample for sample in self.samples)]

    def rows(self) -> list[list[Any]]:
        """The samples as rows of `columns`, the rewards by name as text."""
        return [[_cell(sample.get(column)) for column in self.columns()]
                for sample in self.samples]


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    scalars = {}
    for name, value in record.items():
        many = isinstance(value, list)
        for i, item in enumerate(value if many else [value]):
            if isinstance(item, int | float):
                scalars[f"{name}/{i + 1}" if many else name] = item
    return scalars


def _cell(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return ", ".join(f"{name} {'-' if item is None else format(item, '.4g')}"
                     for name, item in value.items())


def plain_names(names: Iterable[str]) -> list[str]:
    """The names for loggers that take letters, digits and _ - . / alone: pass@4 is pass_at_4, and
    kl(k1) is kl_k1. No two become one."""
    plain: dict[str, None] = {}
    for name in names:
        text = re.sub(r"[^\w./-]+", "_", name.replace("@", "_at_"), flags=re.ASCII)
        text = "/".join(part.strip("_.") or "_" for part in text.split("/"))[:LONGEST_NAME]
        while text in plain:
            text += "_2"
        plain[text] = None
    return list(plain)


class Logger(Protocol):
    """A place where a run is looked at, opened by `NAME(card, done)`. Any of it may raise anything.

    Opened after step `done`, it takes back what it has of later ones, as far as it can. Step 0 is
    an evaluation before the first one; `done` is -1 where there is not even that.

    Attributes:
      held: the last step up to which it has everything; -1: it has nothing. `write` is called for
        all that come after it, in order.
    """

    held: int

    def write(self, entry: Entry) -> None:
        """Log a step, flushed where that can be done."""
        ...

    def close(self) -> None: ...
