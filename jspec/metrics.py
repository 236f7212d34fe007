"""What a run says of itself: a JSON line and TensorBoard scalars a step, lines and a table for people to read."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

TIMINGS = ("seconds/", "tokens_per_second")
"""Prefixes of the fields that differ between two runs of the same thing; all others are equal."""

PHASES = ("data", "reshard", "rollout", "reward", "draft", "update", "checkpoint")
WINDOW = 20  # steps in the running mean that acceptance is compared with
EXPECTED = 20  # accepted tokens that the mean promises for a step: with fewer, half of them is within chance
TABLE_ROWS = 12


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what may differ between two runs of the same thing."""
    return {key: value for key, value in record.items() if not key.startswith(TIMINGS)}


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a last line that a crash cut short is left out."""
    path, records = Path(path), []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def keep_steps(path: Path, steps: int) -> list[dict[str, Any]]:
    """Cut a metrics.jsonl back to its first `steps` steps, in one move, and return their records."""
    records = [record for record in read_records(path) if record["step"] <= steps]
    if path.exists():
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        os.replace(shorter, path)
    return records


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(phase):  # what a trace of the host shows
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def record(self) -> dict[str, float]:
        """Fields `seconds/PHASE` and `seconds/step`, all that has passed since the step began."""
        fields = {f"seconds/{phase}": round(value, 4) for phase, value in self.seconds.items()}
        return {**fields, "seconds/step": round(time.perf_counter() - self.start, 4)}


class Metrics:
    """Writes records to output_dir/metrics.jsonl and output_dir/tensorboard, and lines to the terminal.

    Opened at step `done`, it first takes back what an interrupted run wrote beyond that step: what the files say is
    then what an uninterrupted run would have written.
    """

    def __init__(self, output_dir: str | Path, done: int, steps: int, console: Console | None = None,
                 write: bool = True):
        """`write` is false on all processes but one: they keep records and write nothing."""
        directory = Path(output_dir)
        self.steps, self.file, self.board, self.records = steps, None, None, []
        if write:
            from tensorboardX import SummaryWriter

            directory.mkdir(parents=True, exist_ok=True)
            self.records = keep_steps(directory / "metrics.jsonl", done)
            self.file = (directory / "metrics.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)
        self.console = console or Console()
        self.progress = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(),
                                 TextColumn("left"), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("train", total=steps, completed=done)

    def write(self, record: dict[str, Any]) -> None:
        """One step's record: numbers, lists of numbers and text. Not-finite numbers become null in the JSON."""
        record = {key: _plain(value) for key, value in record.items()}
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            for name, value in _scalars(record):
                self.board.add_scalar(name, value, record["step"])
        alarm = acceptance_alarm(self.records, record)
        self.records.append(record)
        self.say(line(record, self.steps))
        if alarm:
            self.say(alarm, "bold red")
        self.progress.advance(self.task)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the progress bar."""
        self.progress.console.print(text, style=style, highlight=False, soft_wrap=True)

    def __enter__(self) -> Metrics:
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()
        if self.file is not None:
            self.file.close()
            self.board.close()


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return float(value) if math.isfinite(value) else None


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        many = isinstance(value, list)
        for i, item in enumerate(value if many else [value]):
            if isinstance(item, int | float):
                yield f"{name}/{i + 1}" if many else name, item


def acceptance_alarm(before: Sequence[dict[str, Any]], record: dict[str, Any]) -> str | None:
    """A line that says so if the share of accepted drafts fell under half of its mean over the latest steps.

    A draft of which next to nothing was ever accepted falls under half by chance, and is no news.
    """
    earlier = [r["acceptance"] for r in before[-WINDOW:] if r.get("acceptance") is not None]
    now = record.get("acceptance")
    if now is None or len(earlier) < 3 or now >= statistics.mean(earlier) / 2:
        return None
    if statistics.mean(earlier) * record["drafted"] < EXPECTED:
        return None
    return (f"ALARM: acceptance fell to {now:.1%} of drafted tokens at step {record['step']}, under half of its mean "
            f"of {statistics.mean(earlier):.1%}: look at the draft (draft/loss, draft/grad_norm)")


def _number(record: dict[str, Any], key: str, form: str) -> str:
    value = record.get(key)
    return "-" if value is None else format(value, form)


def line(record: dict[str, Any], steps: int) -> str:
    """A step in one line."""
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}", f"reward {_number(record, 'reward', '.3f')}",
             f"length {_number(record, 'length', '.1f')}", f"finished {_number(record, 'finished', '.0%')}",
             f"{_number(record, 'tokens_per_second', '.1f')} tok/s"]
    if record.get("acceptance") is not None:
        parts.append(f"{record['acceptance_length']:.2f} tok/cycle (accepted {record['acceptance']:.0%})")
    parts += [f"gap {_number(record, 'logprob_gap', '.1e')}", f"{_number(record, 'seconds/step', '.1f')} s"]
    return "  ".join(parts)


def table(records: Sequence[dict[str, Any]]) -> Table:
    """The run at a glance: at most `TABLE_ROWS` of its steps, evenly spread."""
    columns = (("step", "step", "d"), ("reward", "reward", ".3f"), ("length", "length", ".1f"),
               ("done", "finished", ".0%"), ("tok/s", "tokens_per_second", ".1f"),
               ("tok/cycle", "acceptance_length", ".2f"), ("accept", "acceptance", ".0%"),
               ("gap", "logprob_gap", ".1e"), ("grad", "grad_norm", ".2f"), ("draft", "draft/loss", ".3f"),
               ("seconds", "seconds/step", ".1f"))
    shown = Table(title="the run, step by step", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title, _, _ in columns:
        shown.add_column(title, justify="right", no_wrap=True)
    count = min(len(records), TABLE_ROWS)
    for i in range(count):
        record = records[round(i * (len(records) - 1) / max(count - 1, 1))]
        shown.add_row(*(_number(record, key, form) for _, key, form in columns))
    return shown


def phase_table(records: Sequence[dict[str, Any]]) -> Table:
    """Seconds a step spends in each phase, as the median over steps (the first ones compile), and their share."""
    medians = {phase: statistics.median([r.get(f"seconds/{phase}", 0.0) for r in records] or [0.0])
               for phase in PHASES}
    total = sum(medians.values()) or 1.0
    shown = Table(title="seconds of a step by phase (median)", box=SIMPLE_HEAD)
    for phase in (*PHASES, "all"):
        shown.add_column(phase, justify="right")
    shown.add_row(*(f"{medians[phase]:.2f}" for phase in PHASES), f"{total:.2f}")
    shown.add_row(*(f"{medians[phase] / total:.0%}" for phase in PHASES), "100%")
    return shown
