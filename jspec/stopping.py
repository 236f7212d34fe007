"""Stopping a loop between two steps, so that what it has computed is kept."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any


class StopSignal:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one stops at once."""

    def __init__(self):
        self.number: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python has signals there only
            self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number: int, _frame: Any) -> None:
        if self.number is not None:
            raise SystemExit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        print(f"jspec: {name}: stopping after this step, with a checkpoint; again to stop at once", file=sys.stderr)

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
