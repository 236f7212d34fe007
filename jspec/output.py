"""Where results go: files that are tried before the work begins, and a console whose reader may
leave."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jspec.console import PlainConsole
from jspec.errors import InputError


class Output:
    """A file to write a result to, whole or not at all. That it can be written is known since it
    was opened."""

    def __init__(self, path: str | Path, option: str) -> None:
        self.option, self.path = option, Path(path)
        with self._explained():
            self.path = self.path.expanduser()
            if self.path.is_dir():
                raise InputError(f"{option} {path} is a directory; name a file in it")
            # /dev/stdout, a pipe: written as it is, for its link leads to no name
            self.special = self.path.exists() and not self.path.is_file()
            if self.special:
                return
            self.path = self.path.resolve()  # a link stays one
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.unlink(self._temporary())

    def write(self, data: str | bytes) -> None:
        """Put `data` there in place of what was there. Raises InputError where that has become
        impossible."""
        data = data.encode() if isinstance(data, str) else data
        with self._explained():
            if self.special:
                self.path.write_bytes(data)
                return
            work = self._temporary()
            try:
                Path(work).write_bytes(data)
                os.chmod(work, 0o666 & ~_umask())
                os.replace(work, self.path)
            except BaseException:
                os.unlink(work)
                raise

    def save(self, figure: Any) -> None:
        """Put a matplotlib figure there, in the format that the file's name ends with."""
        drawn = io.BytesIO()
        figure.savefig(drawn, format=self.path.suffix.removeprefix("."), dpi=110)
        self.write(drawn.getvalue())

    def _temporary(self) -> str:
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name[:32]}-", dir=self.path.parent)
        os.close(handle)
        return name

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # no such user, a NUL in a name, a loop of links
            if isinstance(error, InputError):
                raise
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            if isinstance(error, FileExistsError | NotADirectoryError):
                reason = "what should be its folder is a file"
            raise InputError(f"{self.option} {self.path} cannot be written: {reason}; name another "
                             "file") from None


def open_output(path: str | None, option: str) -> Output | None:
    """The file that an option names, None where it names none. Raises InputError, before there is
    anything to lose, if nothing can be written there. Folders that are missing are made."""
    return None if path is None else Output(path, option)


def open_directory(path: str | Path, option: str) -> Path:
    """A folder to write into, made where it is missing. Raises InputError if nothing can be written
    there."""
    Output(Path(path) / "result", option)
    return Path(path).expanduser()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def screen(**options: Any) -> PlainConsole:
    """What a command prints to, options as rich has them. When nobody reads any more
    (`jspec eval ... | head`) it goes quiet, and what else the command was asked for, such as a
    file, is still made. Of several processes the first one prints."""
    import jax  # what only writes files needs none

    # asked first: a device is not to be woken before it is needed
    joined = jax.distributed.is_initialized()
    return PlainConsole(lambda: None, quiet=joined and jax.process_index() > 0, **options)


def table_screen(stderr: bool) -> PlainConsole:
    """The same for tables, on stderr or stdout: of a pipe or a file nobody knows how wide it is."""
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else 120
    return screen(stderr=stderr, width=wide)
