"""The config.json of published EAGLE-3 drafts, in the layouts that `jspec.hub.eagle3` reads and
writes.

`eagle_aux_hidden_state_layer_ids` has two conventions, a layer apart. Id i at the top of
config.json (vLLM, speculators) is the layer whose input is taken: depth i. Inside `eagle_config`
(SpecForge, SGLang) it is the layer whose output is taken: depth i + 1. The draft's config holds
depths.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from jspec.drafts.eagle3 import Eagle3Config
from jspec.drafts.parts.fusing import FusedConfig, published_depths
from jspec.drafts.peagle import PeagleConfig
from jspec.errors import InputError
from jspec.hub.architectures import config_to_hf
from jspec.hub.draft_configs import (
    BLOCKS,
    FULL,
    LAYER,
    SLIDING,
    block_family,
    check_kind,
    completed,
    layers_of,
    speculators_config,
    steps,
    windows_of,
)
from jspec.hub.fields import (
    agreed,
    contradiction,
    flag,
    merged,
    section,
    short,
    texts,
    told_of,
    whole,
)
from jspec.model import ModelConfig

AUX_CONVENTIONS = {"input": 0, "output": 1}
"""What is to be added to the id of an auxiliary layer to have its depth, by what of that layer is
taken."""

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_TRAP = FLAGS[0]
_AUX = "eagle_aux_hidden_state_layer_ids"
_COUNT = "num_aux_hidden_states"
_MASKS = ("mask_token_id", "ptd_token_id", "pard_token")
_SERVED_AS = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}


def read_config(path: Path, hf: dict[str, Any], policy: ModelConfig, depths: int | None,
                aux_convention: str | None) -> FusedConfig:
    """What config.json says of a draft in the directory `path`; of the tensors' dtype, vocabulary
    and embedding it says nothing. Raises InputError for a draft of another policy, and for what is
    not supported."""
    with told_of(path):
        block, windows = _block(hf, policy)
        # some trainers put the flags inside
        said = merged(hf, "eagle_config", (*FLAGS, *_MASKS, "use_aux_hidden_state"))
        if not flag(said, "use_aux_hidden_state", True):
            raise InputError("a draft without auxiliary hidden states is not supported; take one "
                             "that has them")
        if LAYER in hf and _TRAP not in said:
            raise InputError(f"config.json does not say {_TRAP}, which the speculators library's "
                             "trainer sets and its reader takes for unset: with the wrong one "
                             "hardly a token is accepted; say it, true or false")
        flags: dict[str, Any] = {name: flag(said, name) for name in FLAGS}
        flags["fc_norm"] = flags["fc_norm"] or flag(hf, "use_aux_norm")
        parallel = is_peagle(hf)
        made = whole(section(hf, "jspec"), "depths", steps(hf, 3) if parallel else 3)
        if parallel:
            flags["mask_token"] = whole(said, agreed(said, *_MASKS), least=0)
        return (PeagleConfig if parallel else Eagle3Config)(
            policy=policy, block=block, window=windows, depths=made if depths is None else depths,
            aux_depths=_aux_depths(hf, policy.num_layers, aux_convention), **flags)


def is_peagle(hf: dict[str, Any]) -> bool:
    """Whether a config.json speaks of a P-EAGLE draft: by its name, or, where vLLM takes one for
    EAGLE-3's, by the token behind its first draft."""
    named = [*texts(hf, "architectures"), str(hf.get("speculators_model_type"))]
    return (any("peagle" in name.lower() for name in named)
            or any(hf.get(name) is not None for name in _MASKS))


def _block(hf: dict[str, Any], policy: ModelConfig) -> tuple[ModelConfig, tuple[int, ...]]:
    """The block as a model of its layers, and the window of each one's attention (0: none)."""
    check_kind(hf)
    names = texts(hf, "architectures") or [str(hf.get("speculators_model_type") or "eagle3")]
    if not is_peagle(hf) and not any("eagle3" in name.lower() for name in names):
        raise InputError(f"{names[0][:200]} is not an EAGLE-3 draft; give a directory that holds "
                         "one")
    own = section(hf, LAYER)
    layer = own or hf
    family = block_family(layer, "qwen3" if own else "llama")
    if own:
        layer = completed(own, family)
    block = layers_of("EAGLE-3", {"num_hidden_layers": 1, **layer}, BLOCKS[family], hf, policy)
    windows = windows_of(layer, block.num_layers)
    return block, tuple(w if w < policy.max_position_embeddings else 0 for w in windows)


def _aux_depths(hf: dict[str, Any], num_layers: int, convention: str | None) -> tuple[int, ...]:
    if convention is not None and convention not in AUX_CONVENTIONS:
        raise InputError(f"aux_convention {convention!r} is unknown; known: "
                         f"{', '.join(AUX_CONVENTIONS)}")
    found = {"input": hf.get(_AUX), "output": section(hf, "eagle_config").get(_AUX)}
    found = {own: ids for own, ids in found.items() if ids}
    for ids in found.values():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise InputError(f"{_AUX} in config.json must be a list of integers, not {short(ids)}")
    depths = {own: tuple(i + AUX_CONVENTIONS[convention or own] for i in ids)
              for own, ids in found.items()}
    if not depths and not published_depths(num_layers):
        raise InputError(f"config.json names no auxiliary layers, and a policy of {num_layers} "
                         f"layers has not those that this stands for, 2, {num_layers // 2} and "
                         f"{num_layers - 3}; name them in {_AUX}")
    fused = next(iter(depths.values()), published_depths(num_layers))
    count = whole(section(hf, LAYER) or hf, _COUNT, len(fused))
    if count != len(fused):
        raise contradiction(_COUNT, count, _AUX, next(iter(found.values()), None))
    if len(set(depths.values())) > 1:
        raise InputError(f"config.json names two sets of auxiliary layers: {found['input']} at the "
                         f"top (each layer's input) and {found['output']} in eagle_config (each "
                         "layer's output); keep one")
    return fused


def config_json(config: FusedConfig, dtype: str, layout: str,
                verifier: str | None = None) -> dict[str, Any]:
    """The config.json of a layout; see `jspec.hub.eagle3.write`. Raises InputError for a block that
    has no name."""
    policy = config.policy
    block, _ = config_to_hf(dataclasses.replace(config.block, stop_tokens=policy.stop_tokens,
                                                pad_token=policy.pad_token))
    if config.block.family not in BLOCKS:
        raise InputError(f"a block of the kind {config.block.family} has no name in published "
                         f"drafts; known: {', '.join(BLOCKS)}")
    block |= _sliding(config)
    shared = {"tie_word_embeddings": False, "draft_vocab_size": config.vocab_size
              or policy.vocab_size, "target_hidden_size": policy.hidden_size,
              **{name: getattr(config, name) for name in FLAGS},
              _AUX: list(config.aux_depths), "jspec": {"depths": config.depths}}
    if isinstance(config, PeagleConfig):
        shared |= {"mask_token_id": config.mask_token}
    if layout == "specforge":
        return {**block, **shared, "architectures": [_SERVED_AS[config.block.family]],
                "torch_dtype": dtype, _COUNT: len(config.aux_depths),
                "eagle_config": {"use_aux_hidden_state": True, _AUX: [
                    depth - AUX_CONVENTIONS["output"] for depth in config.aux_depths]}}
    del block["architectures"], block["torch_dtype"]
    if len(config.aux_depths) != 3:  # which is what vLLM takes there to be, unless the block says
        block[_COUNT] = len(config.aux_depths)
    trained = config.own_embed and config.trains_embed
    return {**shared, "dtype": dtype, "embed_requires_grad": trained, LAYER: block,
            **speculators_config(config.kind, {"eagle3": "Eagle3DraftModel",
                                               "peagle": "PEagleDraftModel"}[config.kind],
                                 config.depths, policy, verifier)}


def not_served(config: FusedConfig, layout: str) -> list[str]:
    """What vLLM would not run of a draft that is exported. (Checked with 0.32.)"""
    unread = isinstance(config, PeagleConfig) and config.fc_norm and layout == "speculators"
    return ["fc_norm of P-EAGLE in this layout"] if unread else []


def _sliding(config: FusedConfig) -> dict[str, Any]:
    """What a block's config.json says of the windows of its layers. Raises InputError for windows
    of two lengths, of which no config can tell."""
    windows = cast(tuple[int, ...], config.window)
    if not any(windows):
        return {}
    if len(set(windows) - {0}) > 1:
        raise InputError(f"a draft with windows of {windows} positions has no name in published "
                         "drafts; known: one length for all layers that have a window")
    of_qwen3 = {"use_sliding_window": True, "max_window_layers": 0}
    return {"sliding_window": max(windows),
            "layer_types": [SLIDING if w else FULL for w in windows],
            **(of_qwen3 if config.block.family == "qwen3" else {})}
