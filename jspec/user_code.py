"""What a user has written: the value that a setting or an option names as `path/to/file.py:NAME`.
Free of JAX."""

import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jspec.errors import InputError, shortened

EXAMPLE = "path/to/file.py:NAME"


def split(text: Any) -> tuple[Path, str] | None:
    """(path, NAME) of `path/to/file.py:NAME`; None for what has another form."""
    file, colon, name = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    return (Path(file), name) if colon and name and file.endswith(".py") else None


def same(one: str, other: str) -> bool:
    """Whether two names mean the same, be it by different paths to one file."""
    def resolved(text: str) -> Any:
        parts = split(text)
        return text if parts is None else (parts[0].resolve(), parts[1])

    return resolved(one) == resolved(other)


def load(label: str, text: str, kind: str, belongs: Callable[[Any], bool]) -> Any:
    """The value of a name that `split` takes; its file is run, with all that it does.

    Args:
      label: what the message of an error begins with.
      kind: in one word what is looked for; `belongs` says whether a value is one. Where NAME is
        missing, the file's are listed.

    Raises InputError if there is no such file, it does not import, or has no NAME.
    """
    file, name = split(text)
    module = import_file(label, file)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if belongs(value) and _own(module, value)]
        listed = f"; its {kind}s are: {', '.join(own)}" if own else ""
        raise InputError(f"{label}: {file} has no {name!r}{listed}")
    return getattr(module, name)


def _own(module: ModuleType, value: Any) -> bool:
    """Whether a function is the file's own and not imported; other values are taken to be."""
    return not inspect.isfunction(value) or value.__module__ == module.__name__


def import_file(label: str, file: Path) -> ModuleType:
    """Runs a Python file as a module of its own, once: as long as the file stays as it is, its
    values are the same ones, by which compiled programs are known again. Raises as `load` does."""
    try:
        source = file.read_bytes()
    except OSError as error:
        if os.path.isfile(file):  # unlike Path's, quiet about names that no file can have
            raise InputError(f"{label}: {file} cannot be read: {error.strerror}") from error
        raise InputError(f"{label}: there is no file {file} (looked in {Path.cwd()})") from error
    digest = hashlib.sha256(f"{file.resolve()}\0".encode() + source).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(f"jspec_user_{file.stem}_{digest}", file)
    if spec.name in sys.modules:
        return sys.modules[spec.name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:  # from the source: bytecode that was kept may be that of the file before
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # anything may go wrong in a file of the user's
        del sys.modules[spec.name]
        raise InputError(f"{label}: {file} does not import: {one_line(error)}") from error
    return module


def one_line(error: BaseException) -> str:
    """An error of the user's making in one short line."""
    try:
        said = str(error)
    except Exception as failure:  # it is of the user's making
        said = f"what it says cannot be read ({type(failure).__name__})"
    return shortened(" ".join(f"{type(error).__name__}: {said}".split()), 200)
