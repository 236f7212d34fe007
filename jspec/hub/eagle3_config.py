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
from typing import Any

from jspec.drafts.eagle3 import Eagle3Config, default_depths
from jspec.errors import InputError
from jspec.hub.architectures import config_to_hf
from jspec.hub.draft_configs import completed, layers_of, speculators_config
from jspec.hub.fields import flag, section, short, texts, whole
from jspec.model import ModelConfig

AUX_CONVENTIONS = {"input": 0, "output": 1}
"""What is to be added to the id of an auxiliary layer to have its depth, by what of that layer is
taken."""

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_AUX = "eagle_aux_hidden_state_layer_ids"
_BLOCKS = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SERVED_AS = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}


def read_config(path: Path, hf: dict[str, Any], policy: ModelConfig, depths: int | None,
                aux_convention: str | None) -> Eagle3Config:
    """What config.json says of a draft in the directory `path`; of the tensors' dtype, vocabulary
    and embedding it says nothing. Raises InputError for a draft of another policy, and for what is
    not supported."""
    try:
        block, window = _block(hf, policy)
        inside = section(hf, "eagle_config")  # where some trainers put the flags
        said = inside | {k: v for k, v in hf.items() if v is not None}
        flags: dict[str, Any] = {name: flag(said, name) for name in FLAGS}
        flags["fc_norm"] = flags["fc_norm"] or flag(hf, "use_aux_norm")
        made = whole(section(hf, "jspec"), "depths", 3)
        return Eagle3Config(policy=policy, block=block, window=window,
                            depths=made if depths is None else depths,
                            aux_depths=_aux_depths(hf, policy.num_layers, aux_convention), **flags)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _block(hf: dict[str, Any], policy: ModelConfig) -> tuple[ModelConfig, int]:
    """The block as a model of one layer, and the window of its attention (0: none)."""
    names = texts(hf, "architectures") or [str(hf.get("speculators_model_type") or "eagle3")]
    if not any("eagle3" in name.lower() for name in names):
        raise InputError(f"{names[0][:200]} is not an EAGLE-3 draft; give a directory that holds "
                         "one")
    own = section(hf, "transformer_layer_config")
    layer = own or hf
    family = layer.get("model_type") or ("qwen3" if own else "llama")
    if not isinstance(family, str) or family not in _BLOCKS:
        raise InputError(f"a block of model_type {short(family)} is not supported; supported: "
                         f"{', '.join(_BLOCKS)}")
    if own:
        layer = completed(own, family)
    if whole(layer, "num_hidden_layers", 1) != 1:
        raise InputError(f"a draft of {layer['num_hidden_layers']} blocks is not supported; "
                         "supported: one")
    if not flag(section(hf, "eagle_config"), "use_aux_hidden_state", True):
        raise InputError("a draft without auxiliary hidden states is not supported; take one that "
                         "has them")
    block = layers_of("EAGLE-3", {"num_hidden_layers": 1, **layer}, _BLOCKS[family], hf, policy)
    window = _window(layer)
    return block, window if window < policy.max_position_embeddings else 0


def _window(layer: dict[str, Any]) -> int:
    """How many positions the block's attention sees; 0: all."""
    window, types = whole(layer, "sliding_window", 0, least=0), texts(layer, "layer_types")
    if not types:
        slides = (flag(layer, "use_sliding_window")
                  and whole(layer, "max_window_layers", 28, least=0) == 0)
        return window if slides else 0
    if types[0] not in ("full_attention", "sliding_attention"):
        raise InputError(f"{short(types[0])} is not supported; supported: full_attention, "
                         "sliding_attention")
    return window if types[0] == "sliding_attention" else 0


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
    if not depths:
        return default_depths(num_layers)
    if len(set(depths.values())) > 1:
        raise InputError(f"config.json names two sets of auxiliary layers: {found['input']} at the "
                         f"top (each layer's input) and {found['output']} in eagle_config (each "
                         "layer's output); keep one")
    return next(iter(depths.values()))


def config_json(config: Eagle3Config, dtype: str, layout: str,
                verifier: str | None = None) -> dict[str, Any]:
    """The config.json of a layout; see `jspec.hub.eagle3.write`. Raises InputError for a block that
    has no name."""
    policy = config.policy
    block, _ = config_to_hf(dataclasses.replace(config.block, stop_tokens=policy.stop_tokens,
                                                pad_token=policy.pad_token))
    if config.block.family not in _BLOCKS:
        raise InputError(f"a block of the kind {config.block.family} has no name in published "
                         f"drafts; known: {', '.join(_BLOCKS)}")
    if config.window:
        block |= {"sliding_window": config.window, "layer_types": ["sliding_attention"]}
        block |= ({"use_sliding_window": True, "max_window_layers": 0}
                  if config.block.family == "qwen3" else {})
    shared = {"tie_word_embeddings": False, "draft_vocab_size": config.vocab_size
              or policy.vocab_size, "target_hidden_size": policy.hidden_size,
              **{name: getattr(config, name) for name in FLAGS},
              _AUX: list(config.aux_depths), "jspec": {"depths": config.depths}}
    if layout == "specforge":
        return {**block, **shared, "architectures": [_SERVED_AS[config.block.family]],
                "torch_dtype": dtype, "num_aux_hidden_states": len(config.aux_depths),
                "eagle_config": {"use_aux_hidden_state": True, _AUX: [
                    depth - AUX_CONVENTIONS["output"] for depth in config.aux_depths]}}
    del block["architectures"], block["torch_dtype"]
    return {**shared, "dtype": dtype, "embed_requires_grad": False,
            "transformer_layer_config": block,
            **speculators_config("eagle3", "Eagle3DraftModel", config.depths, policy, verifier)}
