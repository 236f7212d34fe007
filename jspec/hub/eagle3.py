"""Published EAGLE-3 checkpoints, read as `eagle3` drafts and written back. Nothing here ever
unpickles.

Three layouts are read. SpecForge's calls the block `midlayer`, vLLM's `layers.0`; both have a flat
config.json. That of the speculators library has vLLM's names, and the block's config inside
`transformer_layer_config`. SpecForge's and speculators' are written (speculators' own converter
from SpecForge's leaves out flags and auxiliary layers).

`d2t` holds offsets: draft token i is token i + d2t[i] of the policy; `t2d` marks the tokens that
some draft token is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from jspec import arguments
from jspec.drafts.base import Draft
from jspec.drafts.eagle3 import Eagle3Config, eagle3, specs
from jspec.errors import InputError
from jspec.hub.eagle3_config import EAGLE3_LAYOUTS, config_json, read_config
from jspec.hub.exporter import new_directory, on_host, whole_directory
from jspec.hub.fields import whole
from jspec.hub.json_io import read_json, write_json
from jspec.hub.safetensors_io import read_tensors, write_tensors
from jspec.hub.tensors import layer_tensor
from jspec.model import Policy, place_on_mesh
from jspec.model.params import is_spec

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
          "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_NAMES = {"fc": "fc.weight", "norm": "norm.weight", "head": "lm_head.weight",
          "embed": "embed_tokens.weight",
          "input_norm": "input_norm.weight", "embed_norm": "midlayer.input_layernorm.weight",
          "hidden_norm": "midlayer.hidden_norm.weight"}
_OLD_NAMES = {"layers.0.": "midlayer.", "aux_norm_low.": "fc_norm.0.",
              "aux_norm_mid.": "fc_norm.1.", "aux_norm_high.": "fc_norm.2."}
# copies of the policy's that trainers leave behind, and what every reader computes
_NOT_THE_DRAFTS = ("verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq")


def read(directory: str | Path, policy: Policy, *, depths: int | None = None,
         aux_convention: str | None = None) -> Draft:
    """An EAGLE-3 checkpoint as an `eagle3` draft: float32 masters, on the mesh of `jax.set_mesh` if
    there is one.

    Args:
      directory: with config.json and safetensors, in any of the three layouts.
      policy: that it drafts for.
      depths: how many are unrolled in training; None: as in the run that wrote it, 3 for others.
      aux_convention: which of a layer its id stands for, "input" or "output", where a converted
        checkpoint has it otherwise than its layout does; None: as the layout has it.

    Raises InputError if the draft's hidden size or vocabulary is not the policy's, an auxiliary
    layer is not there, a tensor is missing, left over or of the wrong shape, `d2t` is out of range
    or `t2d` disagrees with it, or the config asks for what is not supported.
    """
    path = arguments.path("draft", directory)
    hf = read_json(path / "config.json")
    config, stored = read_config(path, hf, policy.config, depths, aux_convention), _stored(path)
    ids = _vocabulary(path, whole(hf, "draft_vocab_size", policy.config.vocab_size), stored,
                      policy.config.vocab_size)
    config = dataclasses.replace(config, vocab_size=0 if ids is None else len(ids),
                                 dtype=_dtype(path, stored),
                                 own_embed="embed_tokens.weight" in stored)
    names = tensor_names(config)
    _check_tensors(path, stored, names, specs(config))
    weights = jax.tree.map(lambda name: stored[name].astype(np.float32), names)
    weights = place_on_mesh(lambda x: x, specs(config), config.block)(weights)
    state = {} if ids is None else {"vocab": jnp.asarray(ids, jnp.int32)}
    return Draft(weights=weights, state=state, config=config, drafter=eagle3)


def write(draft: Draft, directory: str | Path, *, dtype: str | None = None,
          layout: str = "specforge", verifier: str | None = None) -> Path:
    """Write an `eagle3` draft: config.json and model.safetensors, whole or not at all.

    Args:
      layout: "specforge", which vLLM and SGLang serve (`norm_before_residual`, `norm_before_fc`, a
        window and a block with query and key norms are known to vLLM alone), or "speculators",
        which vLLM serves and the speculators library trains on.
      dtype: in which tensors are stored, by default the one that the draft was read in (a new one:
        bfloat16): a draft that was read and not trained has its bits back.
      verifier: the policy's hub id or path, which speculators' config may name.

    With several processes all call this and the first writes. Raises InputError if the directory
    has files in it.
    """
    config = draft.config
    if draft.name != "eagle3":
        raise InputError(f"a {draft.name} draft cannot be written as EAGLE-3; take one of "
                         "jspec.drafts.eagle3")
    dtype = config.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    if layout not in EAGLE3_LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown; known: {', '.join(EAGLE3_LAYOUTS)}")
    hf = config_json(config, dtype, layout, verifier)
    target = new_directory(directory)
    tensors = {name: on_host(x).astype(DTYPES[dtype]) for name, x in zip(
        jax.tree.leaves(tensor_names(config)), jax.tree.leaves(draft.weights), strict=True)}
    if layout == "speculators":
        tensors = {name.replace("midlayer.", "layers.0."): x for name, x in tensors.items()}
    if config.vocab_size:
        ids = np.asarray(draft.state["vocab"], np.int64)
        tensors["d2t"] = ids - np.arange(len(ids))
        tensors["t2d"] = np.isin(np.arange(config.policy.vocab_size), ids)
    if jax.process_index() == 0:
        with whole_directory(target) as work:
            write_json(work / "config.json", hf)
            write_tensors(work / "model.safetensors", tensors)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jspec.hub.eagle3.write")
    return target


def tensor_names(config: Eagle3Config) -> Any:
    """SpecForge's name of every parameter, in the tree of `drafts.eagle3.specs`."""
    def name(path, _) -> str:
        top, *below = (getattr(part, "key", getattr(part, "idx", None)) for part in path)
        if top == "layer":
            return f"midlayer.{layer_tensor(below[0])}"
        return f"fc_norm.{below[0]}.weight" if top == "fc_norm" else _NAMES[top]

    return jax.tree_util.tree_map_with_path(name, specs(config), is_leaf=is_spec)


def _stored(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the directory's safetensors under its name in SpecForge's layout."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: no safetensors; pickled weights are never loaded: convert the "
                         "draft to safetensors")
    out: dict[str, np.ndarray] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            plain = name.removeprefix("model.")
            for old, new in _OLD_NAMES.items():
                plain = new + plain.removeprefix(old) if plain.startswith(old) else plain
            if plain in out:
                raise InputError(f"{path}: tensor {plain} is there twice, once as {name}; remove "
                                 "one of the two")
            if not plain.endswith(_NOT_THE_DRAFTS):
                out[plain] = tensor
    return out


def _dtype(path: Path, stored: dict[str, np.ndarray]) -> str:
    """In which all that is stored can be stored without loss."""
    found = {name: x.dtype.name for name, x in stored.items() if name not in ("d2t", "t2d")}
    for name, dtype in found.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: tensor {name} is stored as {dtype}; supported: "
                             f"{', '.join(DTYPES)}")
    kinds = set(found.values())
    return kinds.pop() if len(kinds) == 1 else "float32"


def _check_tensors(path: Path, stored: dict[str, np.ndarray], names: Any, tree: Any) -> None:
    expected = dict(zip(jax.tree.leaves(names), jax.tree.leaves(tree, is_leaf=is_spec),
                        strict=True))
    missing = [name for name in expected if name not in stored]
    if missing:
        raise InputError(f"{path}: of an EAGLE-3 draft these tensors are missing: "
                         f"{', '.join(missing)}")
    left = sorted(set(stored) - set(expected) - {"d2t", "t2d"})
    if left:
        raise InputError(f"{path}: these tensors have no place in an EAGLE-3 draft of this config: "
                         f"{', '.join(left)}")
    for name, spec in expected.items():
        if stored[name].shape != spec.shape:
            raise InputError(f"{path}: tensor {name} has shape {list(stored[name].shape)}, but the "
                             f"config says {list(spec.shape)}")


def _vocabulary(path: Path, size: int, stored: dict[str, np.ndarray],
                vocab_size: int) -> np.ndarray | None:
    """The policy's ids of the draft's `size` tokens, int64 [Vd]; None: they are the whole
    vocabulary."""
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
