"""What a run says of itself: a JSON line a step, for loggers too, and lines and a table for people
to read."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
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
from jspec.loggers import Loggers, RunCard
from jspec.run_files import (  # noqa: F401 - read_records and untimed as from here
    METRICS,
    Sample,
    keep_samples,
    keep_steps,
    read_records,
    untimed,
    write_samples,
)
from jspec.sections import LoggingSection

WINDOW = 20  # steps in the running mean that acceptance is compared with
# accepted tokens that the mean promises for a step: with fewer, half of them is within chance
EXPECTED = 20
TABLE_ROWS = 12
WIDE = 1e7  # numbers from here on are shown by their first digits


class Metrics:
    """Writes records to output_dir/metrics.jsonl, samples beside it, both to the loggers, and lines
    to the terminal.

    Opened at step `done`, it first takes back what an interrupted run wrote beyond that step: what
    the files say is then what an uninterrupted run would have written. Opening and writing raise
    InputError where a file cannot be written.
    """

    def __init__(self, output_dir: str | Path, done: int, steps: int,
                 console: Console | None = None, write: bool = True,
                 section: LoggingSection = LoggingSection(),  # noqa: B008 - frozen
                 config: Mapping[str, Any] | None = None) -> None:
        """`write` is false on all processes but one: they keep records and write nothing. config:
        the value of each dotted key, for loggers that show it."""
        self.directory = Path(output_dir)
        self.steps, self.file, self.loggers, self.records = steps, None, None, []
        if write:
            with self._written(f"metrics after step {done}"):
                self.directory.mkdir(parents=True, exist_ok=True)
                kept = keep_steps(self.directory / METRICS, done)
                keep_samples(self.directory, done)
                self.file = (self.directory / METRICS).open("a", encoding="utf-8")
            card = RunCard(self.directory, section.project, section.name
                           or self.directory.resolve().name, config or {})
            self.records = [record for record in kept if record["step"]]
            self.loggers = Loggers(section.loggers, card, kept, done)
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
            self.loggers.write(record)
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

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Keep some of the answers of a step. Call it before the step's `write`, for whoever reads
        its record finds them."""
        if self.file is not None:
            with self._written(f"the samples of step {step}"):
                write_samples(self.directory, step, samples)

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
            self.loggers.close()


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return float(value) if math.isfinite(value) else None


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
