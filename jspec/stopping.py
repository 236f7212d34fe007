"""Stopping a loop between two steps, so that what it has computed is kept."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def terminate_by_exception() -> Iterator[None]:
    """SIGTERM raises SystemExit while the block runs, so that pools are shut down and files closed
    on the way out."""
    def terminate(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignal:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python has signals there only
            self.before = {number: signal.signal(number, self.handle)
                           for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number: int, _frame: Any) -> None:
        if self.number is not None:
            raise SystemExit(128 + number)
        self.ask(number, f"{signal.Signals(number).name}: stopping after this step, with "
                 "a checkpoint; again to stop at once")

    def closed_output(self) -> None:
        """Nobody reads what is printed (`| head -2`): as SIGPIPE would, but with a checkpoint."""
        if self.number is None:
            self.ask(signal.SIGPIPE, "nobody reads the output any more: stopping after this step, "
                     "with a checkpoint; the same command goes on (send the output to a file to "
                     "keep it running)")

    def ask(self, number: int, why: str) -> None:
        """Stop after the step as if signal `number` had come."""
        self.number = number
        with suppress(OSError):  # stderr may have gone the same way
            print(f"jspec: {why}", file=sys.stderr)

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
