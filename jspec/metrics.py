"""What a run says of itself: a JSON line and TensorBoard scalars a step, lines and a table for
people to read."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from jspec.clock import PHASES, Clock, CompileSeconds
from jspec.console import PlainConsole
from jspec.errors import InputError
from jspec.hub.json_io import parse_json

log = logging.getLogger(__name__)

TIMINGS = ("seconds/", "tokens_per_second", "compilations")
"""Prefixes of the fields that differ, as `time` does, between two runs of the same thing; all
others are equal."""

WINDOW = 20  # steps in the running mean that acceptance is compared with
# accepted tokens that the mean promises for a step: with fewer, half of them is within chance
EXPECTED = 20
TABLE_ROWS = 12
WIDE = 1e7  # numbers from here on are shown by their first digits


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what may differ between two runs of the same thing."""
    return {key: value
            for key, value in record.items() if key != "time" and not key.startswith(TIMINGS)}


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; none if there is no such file. Lines that are no
    records are left out: a last one that a crash cut short, and others with a warning. Raises
    InputError if it cannot be read."""
    path, records = Path(path), []
    if not path.exists():
        return records
    try:
        if not path.is_file():
            raise InputError(f"{path} is no file, and metrics are written there; move it away")
        *lines, unended = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    for number, text in enumerate((*lines, unended), start=1):
        try:
            if text.strip():
                records.append(_record(text, f"{path}:{number}"))
        except InputError as error:
            if number <= len(lines):
                log.warning("%s: left out", error)
    return records


def _record(text: bytes, where: str) -> dict[str, Any]:
    record = parse_json(text, where)
    if type(record.get("step")) is not int:
        raise InputError(f"{where}: no record of a step: it has no whole number 'step'")
    return record


def keep_steps(path: Path, steps: int) -> list[dict[str, Any]]:
    """Cut a metrics.jsonl back to its first `steps` steps, in one move, and return their records;
    with them what an evaluation before the first step wrote as step 0, which no start without a
    checkpoint keeps."""
    records = [record for record in read_records(path) if record["step"] <= steps and steps]
    if path.exists():
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(json.dumps(record) + "\n" for record in records),
                           encoding="utf-8")
        os.replace(shorter, path)
    return records


class Board:
    """TensorBoard's scalars, written as they come: tensorboardX's own SummaryWriter hangs on a full
    disk."""

    def __init__(self, directory: Path, done: int) -> None:
        """What the files in `directory` say of steps after `done` is shown no more."""
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        directory.mkdir(exist_ok=True)
        self.event, self.scalar = event_pb2.Event, scalar
        self.writer = event_file_writer.EventsWriter(str(directory / "events"),
                                                     f".{os.getpid()}.{done}")
        start, first = event_pb2.SessionLog(status=event_pb2.SessionLog.START), done and done + 1
        self.writer.write_event(self.event(wall_time=time.time(), step=first, session_log=start))

    def write(self, step: int, scalars: Iterator[tuple[str, float]]) -> None:
        for name, value in scalars:
            self.writer.write_event(self.event(wall_time=time.time(), step=step,
                                               summary=self.scalar(name, value)))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Metrics:
    """Writes records to output_dir/metrics.jsonl and output_dir/tensorboard, and lines to the
    terminal.

    Opened at step `done`, it first takes back what an interrupted run wrote beyond that step: what
    the files say is then what an uninterrupted run would have written. Opening and writing raise
    InputError where a file cannot be written.
    """

    def __init__(self, output_dir: str | Path, done: int, steps: int,
                 console: Console | None = None, write: bool = True) -> None:
        """`write` is false on all processes but one: they keep records and write nothing."""
        self.directory = Path(output_dir)
        self.steps, self.file, self.board, self.records = steps, None, None, []
        if write:
            with self._written(f"metrics after step {done}"):
                self.directory.mkdir(parents=True, exist_ok=True)
                kept = keep_steps(self.directory / "metrics.jsonl", done)
                self.records = [record for record in kept if record["step"]]
                self.file = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
                self.board = Board(self.directory / "tensorboard", done)
        self.compile_seconds = CompileSeconds()
        self.console = console or PlainConsole()
        self.progress = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(),
                                 TimeElapsedColumn(),
                                 TextColumn("left"), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("train", total=steps, completed=done)

    @contextmanager
    def _written(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.directory}: cannot write {what}: {error.strerror}; make room "
                             "or make it writable, and the same command goes on from the last "
                             "checkpoint") from None

    def clock(self) -> Clock:
        """Of the step that begins now."""
        return Clock(self.compile_seconds)

    def write(self, record: dict[str, Any]) -> None:
        """One step's record: numbers, lists of numbers and text. It gets the time, and numbers that
        are not finite become null in the JSON. Of step 0 there is an evaluation, and no step."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {key: _plain(value) for key, value in {**record, "time": now}.items()}
        if self.file is not None:
            with self._written(f"the metrics of step {record['step']}"):
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
                self.board.write(record["step"], _scalars(record))
        if scores := evaluation_line(record):
            self.say(scores)
        if not record["step"]:
            return
        alarm = acceptance_alarm(self.records, record)
        self.records.append(record)
        self.say(line(record, self.steps))
        if alarm:
            self.say(alarm, "bold red")
        self.progress.advance(self.task)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the progress bar."""
        self.progress.console.print(text, style=style, soft_wrap=True)

    def __enter__(self) -> Metrics:
        self.compile_seconds.__enter__()
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()
        self.compile_seconds.__exit__(*exception)
        if self.file is not None:
            # every record has been flushed; what one could not be written for has been said
            with suppress(OSError):
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
    """A line that says so if the share of accepted drafts fell under half of its mean over the
    latest steps.

    A draft of which next to nothing was ever accepted falls under half by chance, and is no news.
    """
    def positions(record: dict[str, Any]) -> int:
        return len(record.get("acceptance_by_position", ()))

    # where more is drafted a smaller share is accepted
    earlier = [r["acceptance"] for r in before[-WINDOW:]
               if r.get("acceptance") is not None and positions(r) == positions(record)]
    now = record.get("acceptance")
    if now is None or len(earlier) < 3 or now >= statistics.mean(earlier) / 2:
        return None
    if statistics.mean(earlier) * record["drafted"] < EXPECTED:
        return None
    return (f"ALARM: acceptance fell to {now:.1%} of drafted tokens at step {record['step']}, "
            f"under half of its mean of {statistics.mean(earlier):.1%}: look at the draft "
            "(draft/loss, draft/grad_norm)")


def _number(record: dict[str, Any], key: str, form: str) -> str:
    value = record.get(key)
    return "-" if value is None else format(value, form if abs(value) < WIDE else ".3g")


def line(record: dict[str, Any], steps: int) -> str:
    """A step in one line."""
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}",
             f"reward {_number(record, 'reward', '.3f')}"]
    if record.get("reward_failures"):
        parts.append(f"reward_failures {record['reward_failures']}")
    parts += [f"length {_number(record, 'length', '.1f')}",
              f"finished {_number(record, 'finished', '.0%')}",
              f"{_number(record, 'tokens_per_second', '.1f')} tok/s"]
    if record.get("acceptance") is not None:
        parts.append(f"{record['acceptance_length']:.2f} tok/cycle  acceptance "
                     f"{record['acceptance']:.0%}")
    if record.get("draft_skipped_in_row") or record.get("draft_finite") is False:
        parts.append("draft NOT FINITE")
    parts += [f"logprob_gap {_number(record, 'logprob_gap', '.1e')}",
              f"{_number(record, 'seconds/step', '.1f')} s"]
    if record.get("seconds/compile"):
        parts.append(f"(compiling {record['seconds/compile']:.1f} s)")
    return "  ".join(parts)


def evaluation_line(record: dict[str, Any]) -> str:
    """The scores of a record's evaluation over all sources; "" where it has none."""
    scores = [f"{name[5:]} {value:.3f}" for name, value in record.items()
              if name.startswith("eval/") and "@" in name and name.count("/") == 1]
    return f"evaluation after step {record['step']}:  {'  '.join(scores)}" if scores else ""


def table(records: Sequence[dict[str, Any]]) -> Table:
    """The run at a glance: at most `TABLE_ROWS` of its steps, evenly spread."""
    columns = (("step", "step", "d"), ("reward", "reward", ".3f"), ("length", "length", ".1f"),
               ("finished", "finished", ".0%"), ("tok/s", "tokens_per_second", ".1f"),
               ("tok/cycle", "acceptance_length", ".2f"), ("acceptance", "acceptance", ".0%"),
               ("logprob_gap", "logprob_gap", ".1e"), ("grad_norm", "grad_norm", ".2f"),
               ("draft/loss", "draft/loss", ".3f"), ("seconds", "seconds/step", ".1f"))
    shown = Table(title="the run, step by step", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title, _, _ in columns:
        shown.add_column(title, justify="right", no_wrap=True)
    count = min(len(records), TABLE_ROWS)
    for i in range(count):
        record = records[round(i * (len(records) - 1) / max(count - 1, 1))]
        shown.add_row(*(_number(record, key, form) for _, key, form in columns))
    return shown


def phase_medians(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median of each phase's seconds over the steps that compiled nothing, or over all if each
    of them did."""
    return {phase: statistics.median([r.get(f"seconds/{phase}", 0.0) for r in _warm(records)
                                      or records] or [0.0]) for phase in PHASES}


def _warm(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if not record.get("seconds/compile")]


def phase_table(records: Sequence[dict[str, Any]]) -> Table:
    """Seconds a step spends in each phase, as the median over the steps that compiled nothing, and
    their share."""
    medians = phase_medians(records)
    total = sum(medians.values()) or 1.0
    which = "of the steps that compiled nothing" if _warm(records) else "compiling included"
    shown = Table(title=f"seconds of a step by phase (median, {which})", box=SIMPLE_HEAD)
    for phase in (*PHASES, "all"):
        shown.add_column(phase, justify="right")
    shown.add_row(*(f"{medians[phase]:.2f}" for phase in PHASES), f"{total:.2f}")
    shown.add_row(*(f"{medians[phase] / total:.0%}" for phase in PHASES), "100%")
    return shown
