"""Checkpoints that transformers loads back: config, generation config, safetensors and the
tokenizer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jspec.arguments import path, whole
from jspec.errors import InputError
from jspec.hub.architectures import config_to_hf
from jspec.hub.json_io import write_json
from jspec.hub.safetensors_io import INDEX, write_file
from jspec.hub.tensors import StoredTensor, stored_tensors
from jspec.model.config import ModelConfig
from jspec.model.params import Policy, check_policy, check_static

MAX_SHARD_BYTES = 5 * 10**9


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place on success and vanishes on
    failure. Those of writers that were killed vanish now."""
    work = _beside(target)
    with _holding(work):
        for left in _others(work):
            with contextlib.suppress(OSError), _holding(left) as ours:
                if ours:
                    shutil.rmtree(left)
        try:
            yield work
            work.chmod(0o755)
            os.rename(work, target)  # replaces an empty directory, refuses one with files
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _holding(directory: Path) -> Iterator[bool]:
    """Whether this process has the lock of a directory now: not if another one that lives has it,
    nor where the file system has no locks."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _others(work: Path) -> list[Path]:
    """What `_beside` made for the same target."""
    prefix, _, _ = work.name.rpartition("-")
    return [path for path in work.parent.iterdir()
            if path != work and re.fullmatch(re.escape(prefix) + r"-\w{8}", path.name)]


def _beside(target: Path) -> Path:
    """A new temporary directory next to `target`. Raises InputError if none can be made."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name[:32]}-unfinished-", dir=target.parent))
    except (OSError, ValueError) as error:  # a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target} cannot be written to: {reason}; choose another "
                         "directory") from None


def _shards(tensors: list[StoredTensor], max_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = 4 * int(np.prod(tensor.shape, dtype=np.int64))
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def write_checkpoint(directory: Path, config: ModelConfig,
                     value: Callable[[StoredTensor], np.ndarray],
                     tokenizer: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a float32 checkpoint into an existing directory. `value(tensor)` gives each tensor when
    its turn comes.

    Raises InputError if no published architecture has this config.
    """
    hf, generation = config_to_hf(config, getattr(tokenizer, "bos_token_id", None))
    write_json(directory / "config.json", hf)
    write_json(directory / "generation_config.json", generation)
    tensors = stored_tensors(config)
    shards = _shards(tensors, max_shard_bytes)
    weight_map = {}
    for i, shard in enumerate(shards):
        by_name = {t.name: t for t in shard}
        name = (f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1
                else "model.safetensors")
        write_file(directory / name, {t.name: (t.shape, "float32") for t in shard},
                   lambda n, by_name=by_name: value(by_name[n]))
        weight_map.update(dict.fromkeys(by_name, name))
    if len(shards) > 1:
        size = sum(4 * int(np.prod(t.shape, dtype=np.int64)) for t in tensors)
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


@jax.jit
def _at(array: jax.Array, place: jax.Array) -> jax.Array:
    """What lies at a place int32 [n] along the leading axes. As a gather, and one program for all
    places: of an array whose experts are split over devices, each gives what it has of the one that
    is asked for, where a slice would collect them all first."""
    return array.at[tuple(place[:, None])].get(mode="promise_in_bounds")[0]


def host_value(weights: Any, tensor: StoredTensor) -> np.ndarray:
    """One tensor of a tree of weights as it is stored, float32, on every process."""
    array = weights
    for part in tensor.key:
        array = array[part]
    return on_host(_at(array, np.asarray(tensor.place, np.int32)) if tensor.place else array)


def on_host(array: jax.Array) -> np.ndarray:
    """A whole array in float32, on every process."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array, np.float32)


def new_directory(directory: str | Path) -> Path:
    """Where to export. Raises InputError if the directory has files in it, or could not be made."""
    target = path("directory", directory).absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty directory; export into a new one")
    _beside(target).rmdir()
    return target


def export(policy: Policy, directory: str | Path, tokenizer: Any = None, *,
           max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Write `policy` (training layout) as a directory that transformers and `jspec.load` read.

    float32 safetensors (with an index above `max_shard_bytes`), config.json, generation_config.json
    and, if given, the tokenizer. The directory appears whole or not at all. With several processes
    all call this and the first writes. Raises InputError if the directory has files in it, or if no
    published architecture has the policy's config.
    """
    check_static("the policy of an export", policy)
    config_to_hf(policy.config)
    check_policy("the policy of an export", policy, stacked=True)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}: give a tokenizer of "
                         "transformers, or None")
    max_shard_bytes = whole(1, 2**63 - 1)("max_shard_bytes", max_shard_bytes)
    target = new_directory(directory)
    if jax.process_index() == 0:
        with whole_directory(target) as work:
            write_checkpoint(work, policy.config, lambda t: host_value(policy.weights, t),
                             tokenizer, max_shard_bytes)
    else:
        for tensor in stored_tensors(policy.config):
            host_value(policy.weights, tensor)  # its part in the gathers of the process that writes
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jspec.export")
    return target
