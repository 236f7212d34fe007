"""Configs of the published architectures to and from `ModelConfig`."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from jspec.errors import InputError
from jspec.hub.fields import CONFIG, flag, number, section, short, texts, whole, wholes
from jspec.model.config import ROPE_SCALINGS, Experts, ModelConfig, RopeConfig

log = logging.getLogger(__name__)

# by architecture; a family's first one is what its policies are exported as
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
                 "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe",
                 "MiMoForCausalLM": "qwen2"}

# what our transformer does not compute of architectures whose MTP heads are known by name
_LACKING = {
    "DeepseekV3ForCausalLM": "multi-head latent attention, shared experts and sigmoid routing",
    "Glm4MoeForCausalLM": "shared experts, sigmoid routing and partial rotary embedding",
    "Qwen3NextForCausalLM": "gated attention, linear attention, shared experts and zero-centred "
                            "norms",
    "Qwen3_5ForConditionalGeneration": "gated attention, linear attention and zero-centred norms",
    "Qwen3_5MoeForConditionalGeneration": "gated attention, linear attention, shared experts and "
                                          "zero-centred norms",
}
_LACKING |= {name.replace("ConditionalGeneration", "CausalLM"): lacking
             for name, lacking in _LACKING.items()}

# what transformers assumes of a key that config.json leaves out
_DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "eos_token_id": 2},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "eos_token_id": None},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "eos_token_id": None,
              "head_dim": 128},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "eos_token_id": None,
                  "num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
_EXPERTS = 128  # as above, of a key that has two names
MOST_LAYERS = 10_000  # which are listed one by one


def end_tokens(*ids: Any) -> tuple[int, ...]:
    """End-token ids (each an int, a list of them, or None) united, in order of appearance."""
    flat = [i for x in ids if x is not None for i in (x if isinstance(x, list | tuple) else [x])]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in flat):
        raise InputError(f"eos_token_id must be an integer or a list of them, not {short(flat)}")
    return tuple(dict.fromkeys(flat))


def family_of(config: dict) -> str:
    """The family of a config.json. Raises InputError, naming the supported architectures, for any
    other."""
    names = texts(config, "architectures")
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        what = (", ".join(names)[:200]
                or f"model_type {short(config.get('model_type'))} without an architecture")
        lacking = _LACKING.get(what)
        reason = "" if lacking is None else f": its layers have {lacking}, which jspec does not "
        raise InputError(f"architecture {what} is not supported{reason and reason + 'compute'}; "
                         f"supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[names[0]]


def rope_from_hf(config: dict, max_position: int) -> RopeConfig:
    """RopeConfig of a config.json, in its old spelling (rope_theta, rope_scaling) or its new one
    (rope_parameters)."""
    params = section(config, "rope_parameters") or section(config, "rope_scaling")
    if any(isinstance(v, dict) for v in params.values()):
        raise InputError("rope parameters that differ by layer type are not supported; "
                         f"supported: one of {', '.join(ROPE_SCALINGS)} for all layers")
    scaling = next((params[key] for key in ("rope_type", "type") if params.get(key) is not None),
                   "default")
    if scaling not in ROPE_SCALINGS:
        raise InputError(f"rope scaling {short(scaling)} is not supported; supported: "
                         f"{', '.join(ROPE_SCALINGS)}")
    both = {**config, **params}
    if number(both, "partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor other than 1 is not supported")
    theta = number(both, "rope_theta", 10000.0)
    if scaling == "default":
        return RopeConfig(theta=theta)
    key = "original_max_position_embeddings"  # at the top it wins, as in transformers
    original = whole({key: config.get(key) or params.get(key)}, key, max_position)
    rope = RopeConfig(theta=theta, scaling=scaling, original_max_position=original)
    if scaling == "yarn":
        given = params.get("attention_factor") is not None
        return dataclasses.replace(
            rope, factor=number(params, "factor", max_position / original),
            beta_fast=number(params, "beta_fast", 32.0), beta_slow=number(params, "beta_slow", 1.0),
            attention_factor=number(params, "attention_factor") if given else None,
            mscale=number(params, "mscale", 0.0),
            mscale_all_dim=number(params, "mscale_all_dim", 0.0),
            truncate=flag(params, "truncate", True))
    rope = dataclasses.replace(rope, factor=number(params, "factor"))
    if scaling == "llama3":
        return dataclasses.replace(rope, low_freq_factor=number(params, "low_freq_factor"),
                                   high_freq_factor=number(params, "high_freq_factor"))
    return dataclasses.replace(rope, original_max_position=0)


def _check_supported(config: dict, family: str, layers: int, max_position: int) -> None:
    """Raise InputError for what a config may ask that our transformer does not compute."""
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act {short(config['hidden_act'])} is not supported; supported: "
                         "silu")
    if config.get("quantization_config"):
        raise InputError("a checkpoint with a quantization_config is not supported; load the "
                         "unquantized one or a GGUF")
    window = whole(config, "sliding_window", max_position, least=0)
    if not flag(config, "use_sliding_window") or window >= max_position:
        return
    if family == "qwen3_moe":
        sliding = True  # on every layer, whatever max_window_layers says
    elif config.get("layer_types") is not None:
        sliding = "sliding_attention" in texts(config, "layer_types")
    else:
        sliding = whole(config, "max_window_layers", 28, least=0) < layers
    if sliding:
        raise InputError(f"sliding-window attention (window {window}) is not supported; supported: "
                         "full attention, that is use_sliding_window false")


def _experts_from_hf(config: dict, layers: int) -> Experts:
    """The experts of a Qwen3-MoE's config.json. What is not read (`router_aux_loss_coef`,
    `output_router_logits`) is of the loss that transformers trains with."""
    for key in ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"):
        if whole(config, key, 0, least=0):
            raise InputError(f"config.json has {config[key]} as {key}: shared experts are no part "
                             "of Qwen3MoeForCausalLM, and not supported")
    step, dense = whole(config, "decoder_sparse_step", 1), set(wholes(config, "mlp_only_layers"))
    return Experts(
        # transformers 5 has a name of its own for what publishers call num_experts
        count=whole(config, "num_experts", whole(config, "num_local_experts", _EXPERTS)),
        top_k=whole(config, "num_experts_per_tok"),
        intermediate_size=whole(config, "moe_intermediate_size"),
        renormalize=flag(config, "norm_topk_prob"),
        dense_layers=tuple(i for i in range(layers) if i in dense or (i + 1) % step))


def _experts_to_hf(experts: Experts) -> dict[str, Any]:
    return {"num_experts": experts.count, "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.intermediate_size,
            "norm_topk_prob": experts.renormalize, "decoder_sparse_step": 1,
            "mlp_only_layers": list(experts.dense_layers)}


def config_from_hf(config: dict, generation_config: dict | None = None) -> ModelConfig:
    """ModelConfig of a config.json and, if there is one, its generation_config.json.

    Raises InputError for an unsupported architecture, rope scaling, sliding window or activation
    (naming what is supported), and for a missing or malformed key.
    """
    family = family_of(config)
    config = {**_DEFAULTS[family], **config}
    generation = generation_config or {}
    heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    layers, max_position = whole(config,
                                 "num_hidden_layers"), whole(config, "max_position_embeddings")
    if layers > MOST_LAYERS:
        raise InputError(f"config.json has {layers} as num_hidden_layers; expected at most "
                         f"{MOST_LAYERS}")
    _check_supported(config, family, layers, max_position)
    kv_heads = whole(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"config.json has {heads} as num_attention_heads, and {kv_heads} as "
                         "num_key_value_heads; give a multiple of the second as the first")
    bias = flag(config, "attention_bias")
    stop = end_tokens(config.get("eos_token_id"), generation.get("eos_token_id"))
    return ModelConfig(
        family=family, vocab_size=whole(config, "vocab_size"), hidden_size=hidden,
        intermediate_size=whole(config, "intermediate_size"), num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=whole(config, "head_dim", hidden // heads),
        rms_norm_eps=number(config, "rms_norm_eps"), rope=rope_from_hf(config, max_position),
        tie_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=True if family == "qwen2" else bias, out_bias=False if family == "qwen2" else bias,
        mlp_bias=family == "llama" and flag(config, "mlp_bias"),
        qk_norm=family in ("qwen3", "qwen3_moe"), experts=_experts_from_hf(config, layers)
        if family == "qwen3_moe" else None, max_position_embeddings=max_position,
        initializer_range=number(config, "initializer_range", 0.02),
        stop_tokens=stop, pad_token=_pad_token(config, generation, stop))


def _pad_token(config: dict, generation: dict, stop: tuple[int, ...]) -> int:
    given = next((fields for fields in (config, generation)
                  if fields.get("pad_token_id") is not None), {})
    return known_pad(whole(given, "pad_token_id", -1, least=-1), stop,
                     whole(config, "vocab_size"), CONFIG)


def known_pad(pad: int, stop: tuple[int, ...], size: int, where: str) -> int:
    """The padding token of a vocabulary of that size: the first end token where there is none
    (some publishers write -1), or none that the weights have a row for, which is said."""
    other = next(iter(stop), 0)
    if pad >= size:
        log.warning("the padding token of %s, %d, is no id of the vocabulary of %d: %d takes its "
                    "place, and no answer is another for it", where, pad, size, other)
    return pad if 0 <= pad < size else other


def rope_to_hf(rope: RopeConfig) -> dict | None:
    """The `rope_scaling` entry of a config.json (theta apart), in the spelling that every
    transformers reads."""
    out: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "default":
        return None
    if rope.scaling in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_max_position
    if rope.scaling == "llama3":
        out.update(low_freq_factor=rope.low_freq_factor, high_freq_factor=rope.high_freq_factor)
    if rope.scaling == "yarn":
        out.update(beta_fast=rope.beta_fast, beta_slow=rope.beta_slow, truncate=rope.truncate)
        optional = {"attention_factor": rope.attention_factor, "mscale": rope.mscale,
                    "mscale_all_dim": rope.mscale_all_dim}
        out.update({k: v for k, v in optional.items() if v})
    return out


def config_to_hf(config: ModelConfig, bos_token: int | None = None) -> tuple[dict, dict]:
    """(config.json, generation_config.json) of a ModelConfig; `config_from_hf` reads the same
    ModelConfig back.

    Raises InputError if no supported architecture has this combination of biases and norms.
    """
    bias = config.qkv_bias
    variants = {"llama": (bias, bias, config.mlp_bias, False), "qwen2": (True, False, False, False),
                "qwen3": (bias, bias, False, True), "qwen3_moe": (bias, bias, False, True)}
    if (variants[config.family]
        != (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm)):
        raise InputError(f"no published {config.family} architecture has "
                         f"qkv_bias={config.qkv_bias}, out_bias={config.out_bias}, "
                         f"mlp_bias={config.mlp_bias}, qk_norm={config.qk_norm}; such a policy "
                         "cannot be exported")
    eos = (config.stop_tokens[0] if len(config.stop_tokens) == 1
           else list(config.stop_tokens) or None)
    tokens = {"bos_token_id": bos_token, "eos_token_id": eos, "pad_token_id": config.pad_token}
    hf = {
        "architectures": [next(a for a, f in ARCHITECTURES.items() if f == config.family)],
        "model_type": config.family, "hidden_act": "silu", "torch_dtype": "float32",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_to_hf(config.rope), "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range, "use_cache": True, **tokens,
    }
    if config.family != "qwen2":
        hf["attention_bias"] = bias
    if config.family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    else:
        hf["use_sliding_window"] = False
    if config.experts is not None:
        hf |= _experts_to_hf(config.experts)
    return hf, dict(tokens)
