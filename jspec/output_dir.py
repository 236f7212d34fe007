"""The folder that a run writes to: that it is the run's own, that no other run writes there, that
it can be written.

Its lock file is what says that a folder is a run's own: nothing of jspec's names is overwritten or
moved in a folder that has none, unless it holds what only a run leaves there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from jspec import checksums
from jspec.distributed import on_main
from jspec.errors import InputError
from jspec.hub.json_io import read_json

log = logging.getLogger(__name__)

LOCK = "jspec.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
RUN_FOLDERS = ("checkpoints", "tensorboard")
RUN_NAMES = (*RUN_FOLDERS, "config.yaml", "changes.jsonl", "metrics.jsonl", "broken_checkpoints",
             "trace", "samples", "loggers")
"""What `jspec train` makes in its output_dir."""


@contextmanager
def claimed(directory: str | Path, names: Sequence[str] = RUN_NAMES,
            folders: Sequence[str] = RUN_FOLDERS) -> Iterator[None]:
    """Holds the folder for this run, and makes it and its `folders` where they are missing. All
    processes call it; the first one does it.

    Raises InputError if the folder holds one of `names` that no run has made, if another run is
    writing there, or if it cannot be written to.
    """
    with ExitStack() as held:
        on_main(lambda: _claim(Path(directory), names, folders, held))
        yield


@contextmanager
def written(directory: str | Path) -> Iterator[None]:
    """Says what the operating system refuses of the folder as an InputError."""
    try:
        yield
    except OSError as error:
        if os.path.islink(directory) and not os.path.exists(directory):
            raise InputError(f"output_dir={directory} is a link to {os.readlink(directory)}, which "
                             "is not there; make that, or choose another output_dir") from None
        raise InputError(f"output_dir={directory} cannot be written to: {error.strerror or error}; "
                         "make room, mend its permissions, or choose another output_dir") from None


@contextmanager
def checkpoints_written(directory: Path) -> Iterator[None]:
    """Says what keeps a checkpoint from being written as an InputError."""
    try:
        yield
    except Exception as error:  # of a full disk every writer in Orbax says something else
        raise InputError(f"a checkpoint cannot be written to {directory} ({brief(error)}); make "
                         "room or mend its permissions, and the same command goes on from the "
                         "last one that is whole") from error


def brief(error: Exception) -> str:
    """What sort of error it is, and the beginning and the end of what it says."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 200 else f"{text[:80]} ... {text[-110:]}"
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {short}"


def _claim(directory: Path, names: Sequence[str], folders: Sequence[str], held: ExitStack) -> None:
    """`held` is given the lock to close in the end."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output_dir={directory} is no folder; move it away, or choose another "
                         "output_dir")
    for folder in (place := directory.resolve(), *place.parents):
        if folder.name in RUN_NAMES and _is_lock(folder.parent / LOCK):
            raise InputError(f"output_dir={directory} lies in {folder}, where the run of "
                             f"{folder.parent} writes and removes what it likes; choose a folder "
                             "outside it")
    taken = [name for name in names if (directory / name).exists()]
    others = taken if not is_run(directory) else []
    if (directory / LOCK).exists() and not _is_lock(directory / LOCK):
        others = [LOCK]
    if others:
        raise InputError(f"output_dir={directory} holds {', '.join(others)}, which no run of jspec "
                         "has made; choose an empty folder, such as "
                         f"output_dir={directory / 'run'}")
    with written(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _lock(directory, held)
        for folder in (directory, *(directory / name for name in folders)):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder} is a file, and a folder is needed there; move it away")
            folder.mkdir(exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"jspec tries whether it can write here")
            probe.unlink()


def _lock(directory: Path, held: ExitStack) -> None:
    """Refuse if another process has the lock. Python's files are not inherited: it is free when
    this process is gone, whatever its reward processes do."""
    file = held.enter_context(open(directory / LOCK, "a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"output_dir={directory} is being written to by another run "
                         f"({file.read(200).strip()}); wait for its end, stop it, or choose "
                         "another output_dir") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("output_dir=%s lies on a file system without locks (%s): nothing keeps "
                    "a second run from writing there", directory, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def is_run(directory: Path) -> bool:
    """Whether a run has been here. Runs of earlier versions left no lock file, but configurations
    and checkpoints that nothing else looks like."""
    return (_is_lock(directory / LOCK) or _dumped(directory / "config.yaml")
            or any(is_checkpoint(path) for path in directory.glob("checkpoints/*")))


def _is_lock(path: Path) -> bool:
    """Whether a file is as `_lock` leaves it, or is about to write it, and no file of that name
    that is somebody's."""
    with suppress(OSError, ValueError):
        return (path.is_file() and re.fullmatch(r"(process \d+ on .*\n?)?",
                                                path.read_text(encoding="utf-8")) is not None)
    return False


def _dumped(path: Path) -> bool:
    """Whether a configuration is as jspec writes it: whole, and without a comment or a line that is
    somebody's own."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        text = path.read_text(encoding="utf-8")
        if re.match(r"seed: \d+\n", text):
            return yaml.safe_dump(yaml.safe_load(text), sort_keys=False) == text
    return False


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a folder that `jspec.checkpoint` wrote, whole or not: it names its items in
    one of two files."""
    if checksums.known(folder):
        return True
    try:
        items = read_json(folder / "_CHECKPOINT_METADATA").get("item_handlers")
    except InputError:
        return False
    return isinstance(items, dict) and {"meta", "policy", "optimizer"} <= items.keys()
