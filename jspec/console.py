"""The terminal, for tables and lines that hold names of the user's: nothing in them is markup, an
emoji or a number to color."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console


class PlainConsole(Console):
    """A console that prints text as it is. What it prints to may go away (`| head -2`): it then
    prints no more."""

    def __init__(self, on_closed: Callable[[], None] | None = None, **options: Any) -> None:
        """`on_closed` is called once when nobody reads any more; None: BrokenPipeError. The options
        are rich's."""
        super().__init__(**options, markup=False, emoji=False, highlight=False)
        self.on_closed = on_closed

    def on_broken_pipe(self) -> None:
        """What rich calls then, from whichever thread was printing."""
        if self.on_closed is None:
            raise BrokenPipeError
        self.quiet = True
        drop_stdout()
        self.on_closed()


def drop_stdout() -> None:
    """From here on nothing is printed: what is left in the buffer must not fail at the program's
    exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
