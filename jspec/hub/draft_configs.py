"""What the config.json files of published drafts of all kinds have in common."""

from __future__ import annotations

import re
from typing import Any

from jspec.drafts.parts.fusing import MOST_LAYERS
from jspec.errors import InputError
from jspec.hub.architectures import ARCHITECTURES, config_from_hf, family_of
from jspec.hub.fields import contradiction, flag, section, short, texts, whole
from jspec.hub.tokenizer import transformers_class
from jspec.model import ModelConfig

LAYOUTS = ("specforge", "speculators")
SPECULATORS_VERSION = "0.9.0"
LAYER = "transformer_layer_config"
"""Where the speculators library's config.json has that of a draft's layers."""
BLOCKS = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""The architecture that a draft's layers are read as, by their model_type."""
FULL, SLIDING = "full_attention", "sliding_attention"
_MADE = ("dflash", "dspark", "eagle3", "peagle", "mtp")
_KIND = re.compile(r"(dflash|dspark|p?eagle|mtp)\d*")  # in an architecture's name
_REFUSED = {"qwen3_next": "Qwen3NextForCausalLM", "qwen3_5_text": "Qwen3_5ForCausalLM",
            "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}
_SLIDING = {"sliding_window": None, "use_sliding_window": False, "layer_types": None,
            "max_window_layers": None}


def completed(layer: dict[str, Any], family: str) -> dict[str, Any]:
    """A transformer_layer_config with what the speculators library leaves out: all that is
    transformers' default. Where it says that no window is used, its layer_types count no more.
    Raises InputError where transformers refuses it."""
    auto = transformers_class("AutoConfig")
    try:
        full = auto.for_model(**{**layer, "model_type": family}).to_dict()
    except Exception as error:  # transformers raises whatever its checks of the values come to
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"transformer_layer_config is refused by transformers: {reason}") from None
    return full | ({"layer_types": None} if layer.get("use_sliding_window") is False else {})


def block_family(layer: dict[str, Any], default: str) -> str:
    """The model_type of a draft's layers. Raises InputError for one that is not supported."""
    family = layer.get("model_type") or default
    if not isinstance(family, str) or family not in BLOCKS:
        if family in _REFUSED:
            family_of({"architectures": [_REFUSED[family]]})
        raise InputError(f"a block of model_type {short(family)} is not supported; supported: "
                         f"{', '.join(BLOCKS)}")
    return family


def check_kind(hf: dict[str, Any]) -> None:
    """Raise InputError where `architectures` names another kind of draft than
    `speculators_model_type`."""
    made = hf.get("speculators_model_type")
    for name in texts(hf, "architectures"):
        found = _KIND.search(name.lower())
        if made in _MADE and found and found[0] != made:
            raise contradiction("architectures", [name], "speculators_model_type", made)


def steps(hf: dict[str, Any], default: int) -> int:
    """How many tokens a draft of the speculators library was trained to predict one after the
    other."""
    methods = section(hf, "speculators_config").get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else {}
    return whole(first if isinstance(first, dict) else {}, "speculative_tokens", default)


def layers_of(kind: str, layer: dict[str, Any], architecture: str, hf: dict[str, Any],
              policy: ModelConfig) -> ModelConfig:
    """The layers of a draft as a model of their own, from their part `layer` of its config `hf`;
    windows are left to the caller. Raises InputError for what is not supported, and for a draft of
    another policy."""
    rope = section(layer, "rope_parameters") or section(layer, "rope_scaling")
    if "yarn" in (rope.get("rope_type"), rope.get("type")) and rope.get("factor") is None:
        raise InputError("config.json has 'yarn' as the rope_type of this draft, and no factor; "
                         "say it beside rope_type")
    block = config_from_hf({**layer, **_SLIDING, "architectures": [architecture],
                            "eos_token_id": None, "pad_token_id": None,
                            "tie_word_embeddings": False})
    if block.num_layers > MOST_LAYERS:
        raise InputError(f"a draft of {block.num_layers} layers is not supported; supported: up to "
                         f"{MOST_LAYERS}")
    for what, made, theirs in (
            ("num_target_layers", whole(hf, "num_target_layers", policy.num_layers),
             policy.num_layers),
            ("hidden size", whole(hf, "target_hidden_size", block.hidden_size), policy.hidden_size),
            ("hidden size", block.hidden_size, policy.hidden_size),
            ("vocabulary size", block.vocab_size, policy.vocab_size)):
        if made != theirs:
            raise InputError(f"this {kind} draft was made for another policy: its {what} is "
                             f"{made}, the policy's is {theirs}; take one made for this policy")
    return block


def windows_of(layer: dict[str, Any], count: int) -> tuple[int, ...]:
    """How many positions the attention of each of a draft's layers sees; 0: all. Raises InputError
    for attention that is not supported, and for types that contradict what else is said."""
    window, types = whole(layer, "sliding_window", 0, least=0), texts(layer, "layer_types")
    if not types:
        full = whole(layer, "max_window_layers", 28, least=0)
        slides = flag(layer, "use_sliding_window")
        return tuple(window if slides and i >= full else 0 for i in range(count))
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise InputError(f"{short(kind)} is not supported; supported: {FULL}, {SLIDING}")
    if len(types) != count:
        raise InputError(f"config.json has {len(types)} layer_types, and {count} as "
                         "num_hidden_layers; give one for each layer")
    if SLIDING in types and not window:
        raise InputError(f"config.json has {SLIDING} in layer_types, and "
                         f"{short(layer.get('sliding_window'))} as sliding_window; say how long "
                         f"the window is (speculators: and use_sliding_window), or {FULL}")
    return tuple(window if kind == SLIDING else 0 for kind in types)


def check_layout(layout: str) -> None:
    """Raise InputError for a layout that is none of LAYOUTS."""
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown; known: {', '.join(LAYOUTS)}")


def speculators_config(algorithm: str, architecture: str, tokens: int, policy: ModelConfig,
                       verifier: str | None) -> dict[str, Any]:
    """What every config.json of the speculators library says: of which algorithm and architecture,
    `tokens` a cycle, for which verifier."""
    return {"architectures": [architecture], "speculators_model_type": algorithm,
            "speculators_version": SPECULATORS_VERSION, "speculators_config": {
                "algorithm": algorithm, "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
                "verifier": {"name_or_path": verifier, "architectures": [
                    next(name for name, family in ARCHITECTURES.items()
                         if family == policy.family)]}}}
