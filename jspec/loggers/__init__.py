"""Loggers: where a run is looked at beside its metrics.jsonl, which they are copies of. A file a
logger, imported when it is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jspec.choices import LOGGERS
from jspec.errors import InputError
from jspec.loggers.base import Entry, Logger, RunCard
from jspec.output_dir import brief

log = logging.getLogger(__name__)


def check_installed(names: Sequence[str]) -> None:
    """Raise InputError for a logger whose package is missing."""
    for name in names:
        package, extra = LOGGERS[name]
        if importlib.util.find_spec(package) is None:
            raise InputError(f"logging.loggers: {name} needs the package {package}, which is not "
                             f"installed: pip install -e '.[{extra}]', or leave {name} out")


class Loggers:
    """The loggers of a run.

    They have what metrics.jsonl has: each is given the records that it lacks, when it is opened and
    at every step. One that fails stops nothing: it is opened again after 2, 4, 8 ... steps.
    """

    def __init__(self, names: Sequence[str], card: RunCard, records: Sequence[dict[str, Any]],
                 done: int) -> None:
        """Opens them after `done` steps, of which these are the records. Raises InputError for one
        that does not open in a run that has not begun: there is somebody to mend it."""
        self.records = list(records)
        self.all = [_Kept(name, card) for name in names]
        for kept in self.all:
            # without a checkpoint not even an evaluation before the first step stays
            kept.give(self.records, done or -1, must=not done)

    def write(self, record: dict[str, Any]) -> None:
        """A step's record, as metrics.jsonl has it; its samples are on disk already."""
        self.records.append(record)
        for kept in self.all:
            kept.give(self.records, record["step"] - 1)

    def close(self) -> None:
        for kept in self.all:
            kept.close()


class _Kept:
    """A logger, while it is open and while it is not."""

    def __init__(self, name: str, card: RunCard) -> None:
        self.name, self.card = name, card
        self.logger: Logger | None = None
        self.failures, self.next_try = 0, -1

    def give(self, records: Sequence[dict[str, Any]], done: int, must: bool = False) -> None:
        """Give the logger the records that it lacks; one that has to be opened takes back what
        comes after `done`. Raises InputError where that fails and `must` not."""
        if self.logger is None and done < self.next_try:
            return
        try:
            if self.logger is None:
                make = importlib.import_module(f"jspec.loggers.{self.name}").open_logger
                self.logger = make(self.card, done)
            start = bisect_right(records, self.logger.held, key=lambda record: record["step"])
            for record in records[start:]:
                self.logger.write(Entry.of(record, self.card.directory))
                self.logger.held = record["step"]
        except Exception as error:  # whatever its library comes to trip over
            if must:
                raise InputError(f"logging.loggers: {self.name} cannot be opened: {brief(error)}; "
                                 "mend that, or leave it out") from error
            self.failed(error, done)
        else:
            if self.failures:
                log.warning("%s goes on, and has been given what it lacked", self.name)
            self.failures = 0

    def failed(self, error: Exception, done: int) -> None:
        if not self.failures:
            log.warning("%s has failed (%s): the run goes on, and %s is given what it lacks as "
                        "soon as it works again, or when the same command is started again",
                        self.name, brief(error), self.name)
        self.failures += 1
        self.next_try = done + 2**self.failures
        self.close()

    def close(self) -> None:
        """What could not be written has been said."""
        if self.logger is not None:
            with suppress(Exception):
                self.logger.close()
        self.logger = None
