"""Published DFlash and DSpark checkpoints, read as `dflash` and `dspark` drafts and written back.

The tensors are called alike in all layouts; the config.json files are in
`jspec.hub.block_drafts_config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspec import arguments
from jspec.drafts.base import Draft
from jspec.drafts.dflash import dflash
from jspec.drafts.dspark import DSparkConfig, dspark
from jspec.drafts.parts.one_pass import OnePassConfig
from jspec.errors import InputError
from jspec.hub.block_drafts_config import config_json, read_config
from jspec.hub.draft_configs import check_layout
from jspec.hub.draft_tensors import (
    check_dtype,
    common_dtype,
    stored_tensors,
    vocabulary_of,
    weights_of,
    write_directory,
)
from jspec.hub.exporter import on_host
from jspec.hub.json_io import read_json
from jspec.hub.tensors import layer_tensor
from jspec.model import Policy
from jspec.model.params import is_spec

DRAFTERS = {"dflash": dflash, "dspark": dspark}
_MARKOV = {"w1": "markov_w1.weight", "w2": "markov_w2.weight"}
_PROJECTION = {"gated": "gate_proj", "rnn": "joint_proj"}
# where SpecForge once had the heads
_OLD_NAMES = {"logit_head.": ""}


def read(directory: str | Path, policy: Policy) -> Draft:
    """A DFlash or DSpark checkpoint as a `dflash` or `dspark` draft: float32 masters, on the mesh
    of `jax.set_mesh` if there is one.

    Args:
      directory: with config.json and safetensors, in SpecForge's, DeepSpec's or speculators'
        layout.
      policy: that it drafts for. An embedding in the directory, and an output head of the whole
        vocabulary, must be the policy's: where it has its weights, they are compared.

    Raises InputError if the draft's hidden size or vocabulary is not the policy's, an auxiliary
    layer is not there, a tensor is missing, left over or of the wrong shape, `d2t` is out of range
    or `t2d` disagrees with it, or the config asks for what is not supported.
    """
    path = arguments.path("draft", directory)
    hf = read_json(path / "config.json")
    config = read_config(path, hf, policy.config)
    stored = stored_tensors(path, _OLD_NAMES)
    ids = vocabulary_of(path, hf, stored, policy.config.vocab_size)
    copies = {"embed_tokens.weight": "embed"}
    if ids is None:
        copies["lm_head.weight"] = _head(policy)
    for name, own in copies.items():
        _check_copy(path, name, stored.pop(name, None), policy.weights[own])
    config = dataclasses.replace(config, vocab_size=0 if ids is None else len(ids),
                                 own_head=ids is not None, dtype=common_dtype(path, stored))
    drafter = DRAFTERS[config.kind]
    kind = {"dflash": "a DFlash", "dspark": "a DSpark"}[config.kind]
    weights = weights_of(path, kind, stored, tensor_names(config), drafter.specs(config),
                         config.block)
    state = {} if ids is None else {"vocab": jnp.asarray(ids, jnp.int32)}
    return Draft(weights=weights, state=state, config=config, drafter=drafter)


def _head(policy: Policy) -> str:
    """Which of the policy's weights its output head is."""
    return "embed" if policy.config.tie_embeddings else "head"


def _check_copy(path: Path, name: str, stored: np.ndarray | None, policy: Any) -> None:
    if stored is None or not isinstance(policy, jax.Array):
        return
    if not np.array_equal(stored.astype(np.float32), on_host(policy)):
        raise InputError(f"{path}: tensor {name} is not the policy's, and a draft of one pass with "
                         "its own is not supported; take the policy that it was made for")


def write(draft: Draft, directory: str | Path, *, dtype: str | None = None,
          layout: str = "specforge", verifier: str | None = None,
          policy: Callable[[], Policy] | None = None) -> Path:
    """Write a `dflash` or `dspark` draft: config.json and model.safetensors, whole or not at all.

    Args:
      layout: "specforge", which vLLM and SGLang serve (of DSpark with DeepSpec's names beside), or
        "speculators", which vLLM serves and the speculators library trains on. What vLLM does not
        run is in `block_drafts_config.not_served`.
      dtype: in which tensors are stored, by default the one that the draft was read in (a new one:
        bfloat16): a draft that was read and not trained has its bits back.
      verifier: the policy's hub id or path, which speculators' config may name.
      policy: reads the draft's policy, whose rows are written as the output head of a draft with a
        reduced vocabulary that has none of its own.

    With several processes all call this and the first writes. Raises InputError if the directory
    has files in it, or there is no policy where it is needed.
    """
    config = draft.config
    if draft.name not in DRAFTERS:
        raise InputError(f"a {draft.name} draft cannot be written as one of one pass; take one of "
                         f"{', '.join(DRAFTERS)}")
    dtype = config.dtype if dtype is None else dtype
    check_dtype(dtype)
    check_layout(layout)
    weights, vocab = draft.weights, draft.state.get("vocab")
    if config.vocab_size and not config.own_head:
        if policy is None:
            raise InputError("a draft with a reduced vocabulary is written with the policy's rows; "
                             "give policy=")
        made = policy()
        weights = {**weights, "head": made.weights[_head(made)][vocab]}
        config = dataclasses.replace(config, own_head=True)
    hf = config_json(config, dtype, layout, verifier)
    tensors = dict(zip(jax.tree.leaves(tensor_names(config)), jax.tree.leaves(weights),
                       strict=True))
    return write_directory(directory, hf, tensors, dtype, vocab, config.policy.vocab_size)


def tensor_names(config: OnePassConfig) -> Any:
    """The name of every parameter, in the tree of the drafter's specs."""
    def name(path, _) -> str:
        top, *below = (getattr(part, "key", getattr(part, "idx", None)) for part in path)
        if top == "layers":
            return f"layers.{below[0]}.{layer_tensor(below[1])}"
        if top == "confidence":
            return f"confidence_head.proj.{'bias' if below[0] == 'bias' else 'weight'}"
        if top == "markov":
            assert isinstance(config, DSparkConfig)
            own = _MARKOV.get(below[0]) or (f"{_PROJECTION[config.markov_head]}."
                                            f"{'bias' if below[0] == 'bias' else 'weight'}")
            return f"markov_head.{own}"
        return "lm_head.weight" if top == "head" else f"{top}.weight"

    specs = DRAFTERS[config.kind].specs(config)
    return jax.tree_util.tree_map_with_path(name, specs, is_leaf=is_spec)
