"""Compiled programs, kept between commands: the second start of the same command compiles next to
nothing.

They are JAX's persistent compilation cache, in a folder of ours where the user named none. A folder
is of one kind of machine: XLA compiles for the very processor and the number of cores that it
finds, and looks at neither when it reads a program back.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path

import jax

from jspec.errors import InputError
from jspec.hub.names import cache_directory

LIMIT_BYTES = 4 * 2**30
"""What all folders together may hold. JAX's own limit is not used: it takes a lock at every read,
and a process that is killed while it writes leaves behind what makes every later write fail."""


def keep_compiled() -> None:
    """Has this process keep the programs that it compiles, and read back those that are kept.

    Does nothing where JAX's own settings name a folder (JAX_COMPILATION_CACHE_DIR; empty: none),
    nor for several processes on GPUs: XLA shares out the tuning among them, and those that compile
    would wait for those that need not. A folder that cannot be written to is a warning.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
        return
    # not to wake a device for a mistake's sake
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    if several and jax.default_backend() == "gpu":
        return
    try:
        root = cache_directory() / "compiled"
    except InputError as error:
        print(f"jspec: warning: {error}: compiled programs are not kept", file=sys.stderr)
        return
    folder = root / kind_of_machine()
    try:
        _make_ours(folder)
        forget(root, LIMIT_BYTES)
    except OSError as error:
        print(f"jspec: warning: {folder} cannot be used ({error.strerror}): compiled programs are "
              "not kept; name another folder with JSPEC_CACHE", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # a program that cannot be written or read back is compiled: no reason for a line about each of
    # a hundred
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def kind_of_machine() -> str:
    """A name for what compiled programs depend on and JAX's keys for them do not: processor, its
    features, cores."""
    try:
        # of the first core
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        processor = [line for line in lines
                     if line.startswith(("model name", "flags", "Features", "CPU "))]
    except OSError:
        processor = [platform.processor()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = repr((platform.system(), platform.machine(), processor, cores))
    return f"jax-{jax.__version__}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _make_ours(folder: Path) -> None:
    """Makes the folder. Raises OSError unless this user, and nobody else, can write to it: what is
    read there runs."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(0, "others than you may write to it")
    probe = folder / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()


def forget(root: Path, limit: int) -> None:
    """Removes the programs under `root` that were longest out of use, until the rest takes `limit`
    bytes at most."""
    entries = []
    for path in root.glob("*/*-cache"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process removes some as well
            continue
        entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
