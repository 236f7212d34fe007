"""The tensors of published drafts: from safetensors to the weights of a draft, and back. Nothing
here ever unpickles.

`d2t` holds offsets: draft token i is token i + d2t[i] of the policy; `t2d` marks the tokens that
some draft token is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from jspec.errors import InputError
from jspec.hub.exporter import new_directory, on_host, whole_directory
from jspec.hub.fields import told_of, whole
from jspec.hub.json_io import write_json
from jspec.hub.safetensors_io import read_tensors, write_tensors
from jspec.model import ModelConfig, place_on_mesh
from jspec.model.params import is_spec

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
          "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_VOCABULARY = ("d2t", "t2d")
# copies of the policy's that trainers leave behind, and what every reader computes
_NOT_THE_DRAFTS = ("verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq")


def stored_tensors(path: Path, renamed: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Every tensor of the directory's safetensors by its name, without a `model.` before it, and
    with the beginnings that `renamed` has turned into what it has for them."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: no safetensors; pickled weights are never loaded: convert the "
                         "draft to safetensors")
    out: dict[str, np.ndarray] = {}
    places: dict[str, str] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            plain = name.removeprefix("model.")
            for old, new in renamed.items():
                plain = new + plain.removeprefix(old) if plain.startswith(old) else plain
            place = f"{name} in {file.name}"
            if plain in out:
                raise InputError(f"{path}: tensor {plain} is there twice, as {places[plain]} and "
                                 f"as {place}; remove one of the two")
            places[plain] = place
            if not plain.endswith(_NOT_THE_DRAFTS):
                out[plain] = tensor
    return out


def common_dtype(path: Path, stored: Mapping[str, np.ndarray]) -> str:
    """In which all that is stored can be stored without loss."""
    found = {name: x.dtype.name for name, x in stored.items() if name not in _VOCABULARY}
    for name, dtype in found.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: tensor {name} is stored as {dtype}; supported: "
                             f"{', '.join(DTYPES)}")
    kinds = set(found.values())
    return kinds.pop() if len(kinds) == 1 else "float32"


def weights_of(path: Path, kind: str, stored: Mapping[str, np.ndarray], names: Any, specs: Any,
               model: ModelConfig) -> Any:
    """The weights of a draft of this kind, float32 masters on the mesh of `jax.set_mesh` if there
    is one, in the tree of its `specs`, of which `names` has the names. Raises InputError for a
    tensor that is missing, left over or of the wrong shape."""
    expected = dict(zip(jax.tree.leaves(names), jax.tree.leaves(specs, is_leaf=is_spec),
                        strict=True))
    missing = [name for name in expected if name not in stored]
    if missing:
        raise InputError(f"{path}: of {kind} draft these tensors are missing: "
                         f"{', '.join(missing)}")
    left = sorted(set(stored) - set(expected) - set(_VOCABULARY))
    if left:
        raise InputError(f"{path}: these tensors have no place in {kind} draft of this config: "
                         f"{', '.join(left)}")
    for name, spec in expected.items():
        if stored[name].shape != spec.shape:
            raise InputError(f"{path}: tensor {name} has shape {list(stored[name].shape)}, but the "
                             f"config says {list(spec.shape)}")
    weights = jax.tree.map(lambda name: stored[name].astype(np.float32), names)
    return place_on_mesh(lambda x: x, specs, model)(weights)


def vocabulary_of(path: Path, hf: dict[str, Any], stored: Mapping[str, np.ndarray],
                  vocab_size: int) -> np.ndarray | None:
    """The policy's ids of the draft's tokens, of which its config `hf` says how many, int64 [Vd];
    None: they are the whole vocabulary. Raises InputError for tensors that do not say so."""
    with told_of(path):
        size = whole(hf, "draft_vocab_size", vocab_size)
    offsets, marks = stored.get("d2t"), stored.get("t2d")
    if offsets is None:
        if size != vocab_size:
            raise InputError(f"{path}: tensor d2t is missing, and the draft's vocabulary is of "
                             f"{size} tokens, the policy's of {vocab_size}")
        return None
    if offsets.shape != (size,) or not np.issubdtype(offsets.dtype, np.integer):
        raise InputError(f"{path}: tensor d2t must hold {size} integers (draft_vocab_size), not "
                         f"{offsets.dtype} of shape {list(offsets.shape)}")
    ids = np.arange(size) + offsets.astype(np.int64)
    beyond = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(beyond):
        raise InputError(f"{path}: d2t makes draft token {beyond[0]} token {ids[beyond[0]]}, "
                         f"outside the policy's {vocab_size}; it holds offsets: token i is "
                         "i + d2t[i]")
    if len(np.unique(ids)) != size:
        raise InputError(f"{path}: d2t makes two draft tokens one token; it holds offsets: token "
                         "i is i + d2t[i]")
    if (marks is not None
        and not (marks.shape == (vocab_size,) and np.array_equal(np.flatnonzero(marks), ids))):
        raise InputError(f"{path}: t2d does not agree with d2t: it must mark those {size} of the "
                         f"policy's {vocab_size} tokens that d2t gives, in ascending order; it "
                         f"marks {int(np.count_nonzero(marks))} of {marks.size}")
    return None if np.array_equal(ids, np.arange(vocab_size)) else ids


def check_dtype(dtype: str) -> None:
    """Raise InputError for a dtype that nothing is stored in."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")


def write_directory(directory: str | Path, hf: dict[str, Any], tensors: Mapping[str, jax.Array],
                    dtype: str, vocab: jax.Array | None, vocab_size: int) -> Path:
    """Write config.json and model.safetensors, whole or not at all; with several processes all call
    this and the first writes.

    vocab: int32 [Vd], the ids of a reduced vocabulary among the policy's `vocab_size`. Raises
    InputError if the directory has files in it.
    """
    target = new_directory(directory)
    stored = {name: on_host(x).astype(DTYPES[dtype]) for name, x in tensors.items()}
    if vocab is not None:
        ids = np.asarray(vocab, np.int64)
        stored["d2t"] = ids - np.arange(len(ids))
        stored["t2d"] = np.isin(np.arange(vocab_size), ids)
    if jax.process_index() == 0:
        with whole_directory(target) as work:
            write_json(work / "config.json", hf)
            write_tensors(work / "model.safetensors", stored)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jspec.hub.draft_tensors.write_directory")
    return target
