"""What a command is doing, on stderr: a moving line with its seconds on a terminal, lines in a log."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LOG_EVERY_S = 15.0
"""In a log, seconds between two lines that count; what took less has no line about its end."""


@functools.cache
def stderr() -> Console:
    """The one console on stderr: bars inside one another must know of each other."""
    return Console(stderr=True)


@contextmanager
def telling(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Says what is going on while the block runs; of several processes only the first one does.

    Args:
      what: such as "compiling the update".
      total: how many parts it has, if they can be counted.

    Yields `advance(parts=1)`, for the block to call after each part.
    """
    if jax.process_index() > 0:
        yield lambda parts=1: None
    elif stderr().is_terminal:
        counts = [] if total is None else [BarColumn(), MofNCompleteColumn()]
        # what is printed meanwhile goes above the line, unless it goes elsewhere: then it must stay there
        with Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), *counts, TimeElapsedColumn(),
                      console=stderr(), transient=True, refresh_per_second=4,
                      redirect_stdout=sys.stdout.isatty()) as bar:
            task = bar.add_task(what, total=total)
            yield lambda parts=1: bar.advance(task, parts)
    else:
        log = _Log(what, total)
        yield log.advance
        log.end()


class _Log:
    """The lines of a log: the beginning, a count now and then, the end of what took long."""

    def __init__(self, what: str, total: int | None):
        self.what, self.total, self.done = what, total, 0
        self.began = self.said = time.monotonic()
        self.say(f"{what} ...")

    def say(self, text: str) -> None:
        stderr().print(f"jspec: {text}", markup=False, highlight=False, soft_wrap=True)

    def advance(self, parts: int = 1) -> None:
        self.done += parts
        now = time.monotonic()
        if now - self.said >= LOG_EVERY_S:
            self.said = now
            self.say(f"{self.what}: {self.done} of {self.total}, {now - self.began:.0f} s")

    def end(self) -> None:
        seconds = time.monotonic() - self.began
        if seconds >= LOG_EVERY_S:
            self.say(f"{self.what}: done in {seconds:.0f} s")
