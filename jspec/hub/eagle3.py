"""Published EAGLE-3 and P-EAGLE checkpoints, read as `eagle3` and `peagle` drafts and written back.

Three layouts are read. SpecForge's calls the block `midlayer`, vLLM's `layers.0`; both have a flat
config.json. That of the speculators library has vLLM's names, and the block's config inside
`transformer_layer_config`. Further layers are `layers.1` and so on in all of them. SpecForge's and
speculators' are written (speculators' own converter from SpecForge's leaves out flags and auxiliary
layers). P-EAGLE has the same layouts and a mask token.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jspec import arguments
from jspec.drafts.base import Draft
from jspec.drafts.eagle3 import eagle3
from jspec.drafts.parts.fusing import FusedConfig
from jspec.drafts.peagle import peagle
from jspec.errors import InputError
from jspec.hub.draft_configs import check_layout
from jspec.hub.draft_tensors import (
    check_dtype,
    common_dtype,
    stored_tensors,
    vocabulary_of,
    weights_of,
    write_directory,
)
from jspec.hub.eagle3_config import config_json, read_config
from jspec.hub.fields import flag, told_of
from jspec.hub.json_io import read_json
from jspec.hub.tensors import layer_tensor
from jspec.model import Policy
from jspec.model.params import is_spec

_NAMES = {"fc": "fc.weight", "norm": "norm.weight", "head": "lm_head.weight",
          "embed": "embed_tokens.weight",
          "mask_hidden": "mask_hidden", "input_norm": "input_norm.weight",
          "embed_norm": "midlayer.input_layernorm.weight",
          "hidden_norm": "midlayer.hidden_norm.weight"}
DRAFTERS = {"eagle3": eagle3, "peagle": peagle}
_OLD_NAMES = {"layers.0.": "midlayer.", "aux_norm_low.": "fc_norm.0.",
              "aux_norm_mid.": "fc_norm.1.", "aux_norm_high.": "fc_norm.2."}


def read(directory: str | Path, policy: Policy, *, depths: int | None = None,
         aux_convention: str | None = None) -> Draft:
    """An EAGLE-3 or P-EAGLE checkpoint as an `eagle3` or `peagle` draft: float32 masters, on the
    mesh of `jax.set_mesh` if there is one.

    Args:
      directory: with config.json and safetensors, in any of the three layouts.
      policy: that it drafts for.
      depths: how many are unrolled in training; None: as in the run that wrote it; of others 3, or
        of P-EAGLE as many as the config says.
      aux_convention: which of a layer its id stands for, "input" or "output", where a converted
        checkpoint has it otherwise than its layout does; None: as the layout has it.

    Raises InputError if the draft's hidden size or vocabulary is not the policy's, an auxiliary
    layer is not there, a tensor is missing, left over or of the wrong shape, `d2t` is out of range
    or `t2d` disagrees with it, or the config asks for what is not supported.
    """
    path = arguments.path("draft", directory)
    hf = read_json(path / "config.json")
    config = read_config(path, hf, policy.config, depths, aux_convention)
    stored = stored_tensors(path, _OLD_NAMES)
    ids = vocabulary_of(path, hf, stored, policy.config.vocab_size)
    config = dataclasses.replace(config, vocab_size=0 if ids is None else len(ids),
                                 dtype=common_dtype(path, stored),
                                 own_embed="embed_tokens.weight" in stored)
    with told_of(path):
        if flag(hf, "embed_requires_grad") and not config.own_embed:
            raise InputError("tensor embed_tokens.weight is missing, and embed_requires_grad in "
                             "config.json says that it was trained; take all files of the draft")
    drafter = DRAFTERS[config.kind]
    kind = {"eagle3": "an EAGLE-3", "peagle": "a P-EAGLE"}[config.kind]
    weights = weights_of(path, kind, stored, tensor_names(config), drafter.specs(config),
                         config.block)
    state = {} if ids is None else {"vocab": jnp.asarray(ids, jnp.int32)}
    return Draft(weights=weights, state=state, config=config, drafter=drafter)


def write(draft: Draft, directory: str | Path, *, dtype: str | None = None,
          layout: str = "specforge", verifier: str | None = None) -> Path:
    """Write an `eagle3` or `peagle` draft: config.json and model.safetensors, whole or not at all.

    Args:
      layout: "specforge", which vLLM and SGLang serve (`norm_before_residual`, `norm_before_fc`, a
        window, a block with query and key norms and `peagle` are known to vLLM alone), or
        "speculators", which vLLM serves and the speculators library trains on.
      dtype: in which tensors are stored, by default the one that the draft was read in (a new one:
        bfloat16): a draft that was read and not trained has its bits back.
      verifier: the policy's hub id or path, which speculators' config may name.

    With several processes all call this and the first writes. Raises InputError if the directory
    has files in it.
    """
    config = draft.config
    if draft.name not in DRAFTERS:
        raise InputError(f"a {draft.name} draft cannot be written as EAGLE-3; take one of "
                         f"{', '.join(DRAFTERS)}")
    dtype = config.dtype if dtype is None else dtype
    check_dtype(dtype)
    check_layout(layout)
    hf = config_json(config, dtype, layout, verifier)
    tensors = dict(zip(jax.tree.leaves(tensor_names(config)), jax.tree.leaves(draft.weights),
                       strict=True))
    if layout == "speculators" or config.block.num_layers > 1:
        tensors = {name.replace("midlayer.", "layers.0."): x for name, x in tensors.items()}
    return write_directory(directory, hf, tensors, dtype, draft.state.get("vocab"),
                           config.policy.vocab_size)


def tensor_names(config: FusedConfig) -> Any:
    """SpecForge's name of every parameter, in the tree of the drafter's specs."""
    def name(path, _) -> str:
        top, *below = (getattr(part, "key", getattr(part, "idx", None)) for part in path)
        if top == "layer":
            return f"midlayer.{layer_tensor(below[0])}"
        if top == "further":
            return f"layers.{below[0] + 1}.{layer_tensor(below[1])}"
        return f"fc_norm.{below[0]}.weight" if top == "fc_norm" else _NAMES[top]

    specs = DRAFTERS[config.kind].specs(config)
    return jax.tree_util.tree_map_with_path(name, specs, is_leaf=is_spec)
