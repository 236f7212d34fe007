"""What a command is doing, on stderr: a moving line with its seconds on a terminal, lines in a
log."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from jspec.console import PlainConsole

AFTER_S, EVERY_S = 2.0, 30.0
"""In a log, seconds until the first line, for what is done or fails at once needs none, and from
one to the next."""


@functools.cache
def stderr() -> Console:
    """The one console on stderr: bars inside one another must know of each other."""
    return PlainConsole(stderr=True)


def say(text: str) -> None:
    """A line on stderr."""
    stderr().print(f"jspec: {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def telling(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Says what is going on while the block runs; of several processes only the first one does.

    Args:
      what: such as "compiling the update".
      total: how many parts it has, if they can be counted.

    Yields `advance(parts=1)`, for the block to call after each part.
    """
    import jax  # the launcher of local processes, which only says things, needs none

    # not to wake a device before it is needed
    if jax.distributed.is_initialized() and jax.process_index() > 0:
        yield lambda parts=1: None
    elif stderr().is_terminal:
        counts = [] if total is None else [BarColumn(), MofNCompleteColumn()]
        # what is printed meanwhile goes above the line, unless it goes elsewhere: then it must stay
        # there
        with Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), *counts,
                      TimeElapsedColumn(), console=stderr(), transient=True, refresh_per_second=4,
                      redirect_stdout=sys.stdout.isatty()) as bar:
            task = bar.add_task(what, total=total)
            yield lambda parts=1: bar.advance(task, parts)
    else:
        log = _Log(what, total)
        log.start()
        try:
            yield log.advance
        finally:
            log.end()


class _Log(threading.Thread):
    """Lines of a log: what has begun, from time to time how far it is, and how long it took."""

    def __init__(self, what: str, total: int | None) -> None:
        super().__init__(daemon=True)
        self.what, self.total, self.done = what, total, 0
        self.began, self.ended = time.monotonic(), threading.Event()

    def run(self) -> None:
        if self.ended.wait(AFTER_S):
            return
        say(f"{self.what} ...")
        while not self.ended.wait(EVERY_S):
            say(f"{self.what}: {self.far()}{self.seconds()}")
        say(f"{self.what}: ended after {self.seconds()}")

    def far(self) -> str:
        return "" if self.total is None else f"{self.done} of {self.total}, "

    def seconds(self) -> str:
        return f"{time.monotonic() - self.began:.0f} s"

    def advance(self, parts: int = 1) -> None:
        self.done += parts

    def end(self) -> None:
        self.ended.set()
        self.join()
