"""The metadata of a GGUF file as a `ModelConfig`, by the keys that llama.cpp writes and reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jspec.errors import InputError
from jspec.hub.architectures import end_tokens, known_pad
from jspec.hub.fields import flag, number, short, whole
from jspec.model.config import Experts, ModelConfig, RopeConfig
from jspec.model.layers import rope_frequencies

# by llama.cpp's name of it: the family
GGUF_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling, stored as one divisor a frequency
_WHERE = "the GGUF"
_SCALING_KEYS = ("type", "factor", "original_context_length", "attn_factor", "finetuned",
                 "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")
_LLAMA3_HIGH, _LLAMA3_ORIGINAL = 4.0, 8192  # as all of Llama 3 is published, with a low factor of 1


def config_from_gguf(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
                     factors: np.ndarray | None = None) -> ModelConfig:
    """ModelConfig of a GGUF's metadata, its tensors' shapes (rows first) and its
    `rope_freqs.weight`, if it has one.

    Raises InputError for an architecture or a scaling that is not supported, and for a key that is
    missing or of the wrong type.
    """
    arch = fields.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        raise InputError(f"GGUF architecture {short(arch)} is not supported; supported: "
                         f"{', '.join(GGUF_ARCHITECTURES)}")
    own = {key.removeprefix(f"{arch}."): value
           for key, value in fields.items() if key.startswith(f"{arch}.")}
    if arch != "qwen3moe" and whole(own, "expert_count", 0, _WHERE, least=0):
        raise InputError("a GGUF with a mixture of experts is not supported; supported: qwen3moe")

    window = whole(own, "attention.sliding_window", 0, _WHERE, least=0)
    if 0 < window < whole(own, "context_length", where=_WHERE):
        raise InputError(f"sliding-window attention (window {window}) of a GGUF is not supported; "
                         "supported: full attention")

    def size(key: str, default: int | None = None) -> int:
        return whole(own, key, default, _WHERE)

    heads, hidden = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", hidden // heads)
    if size("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"the GGUF rotates {own['rope.dimension_count']} of {head_dim} dimensions "
                         "of a head; supported: all of them")
    stop = end_tokens(fields.get("tokenizer.ggml.eos_token_id"),
                      fields.get("tokenizer.ggml.eot_token_id"))
    vocab_size = _vocab_size(shapes)
    pad = whole(fields, "tokenizer.ggml.padding_token_id", -1, _WHERE, least=-1)
    return ModelConfig(
        family=GGUF_ARCHITECTURES[arch], vocab_size=vocab_size, hidden_size=hidden,
        intermediate_size=size("feed_forward_length"), num_layers=size("block_count"),
        num_heads=heads, num_kv_heads=size("attention.head_count_kv", heads), head_dim=head_dim,
        rms_norm_eps=_decimal(number(own, "attention.layer_norm_rms_epsilon", where=_WHERE)),
        rope=_rope(own, head_dim, factors), tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes, out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes, qk_norm="blk.0.attn_q_norm.weight" in shapes,
        experts=_experts(own, shapes) if arch == "qwen3moe" else None,
        max_position_embeddings=size("context_length"), stop_tokens=stop,
        pad_token=known_pad(pad, stop, vocab_size, _WHERE))


def _experts(own: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Experts:
    """llama.cpp renormalises in this architecture, whatever the publisher's config says, and asks
    for experts in every layer; which have none, the tensors say."""
    for key, known in (("expert_shared_count", (0,)), ("expert_shared_feed_forward_length", (0,)),
                       ("expert_weights_scale", (0, 1)), ("expert_gating_func", (0, 1))):
        found = number(own, key, 0, _WHERE)
        if found not in known:
            raise InputError(f"the GGUF has {found:g} as {key}, which is not supported in "
                             "qwen3moe; use the model's safetensors")
    top_k = whole(own, "expert_used_count", where=_WHERE)
    width = whole(own, "feed_forward_length", where=_WHERE)
    dense = (re.fullmatch(r"blk\.(\d{1,9})\.ffn_gate\.weight", name) for name in shapes)
    return Experts(
        count=whole(own, "expert_count", where=_WHERE), top_k=top_k,
        intermediate_size=whole(own, "expert_feed_forward_length", width // top_k, _WHERE),
        renormalize=flag(own, "expert_weights_norm", True, _WHERE),
        dense_layers=tuple(sorted(int(found[1]) for found in dense if found)))


def _vocab_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes.get("token_embd.weight", ())
    if len(shape) != 2:
        raise InputError("the GGUF has no token_embd.weight of two dimensions; it is not "
                         "a complete language model")
    return shape[0]


def _decimal(value: float) -> float:
    """A float32 of the file as the decimal it was written from (1e-05, not
    9.999999747378752e-06)."""
    return float(str(np.float32(value)))


def _rope(own: Mapping[str, Any], head_dim: int, factors: np.ndarray | None) -> RopeConfig:
    """The keys `rope.*` below the architecture's name. What they say is followed or refused, never
    left out."""
    def scaling(key: str, default: float) -> float:
        return _decimal(number(own, f"rope.scaling.{key}", default, _WHERE))

    unknown = sorted(key for key in own if key.startswith("rope.scaling.")
                     and key.removeprefix("rope.scaling.") not in _SCALING_KEYS)
    if unknown:
        raise InputError(f"the GGUF's {unknown[0]} is not supported; use the model's safetensors")
    theta = _decimal(number(own, "rope.freq_base", 10000.0, _WHERE))
    kind = own.get("rope.scaling.type", "linear")  # llama.cpp's default, with a factor of 1
    factor = scaling("factor", number(own, "rope.scale_linear", 1.0, _WHERE))
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"rope scaling {short(kind)} of a GGUF is not supported; supported: none, "
                         "linear, yarn, and Llama 3's rope_freqs")
    acts = {"attn_factor": scaling("attn_factor", 1.0) != 1.0,
            "yarn_ext_factor": scaling("yarn_ext_factor", 0.0) > 0}
    for key in (key for key in acts if acts[key] and kind != "yarn"):
        raise InputError(f"the GGUF's rope.scaling.{key} is supported with yarn only; use the "
                         "model's safetensors")
    if factors is not None:
        if kind == "yarn" or kind == "linear" and factor not in (0.0, 1.0):
            raise InputError(f"the GGUF scales its rope twice, by {ROPE_FACTORS} and as "
                             f"rope.scaling.type {kind} says; use the model's safetensors")
        return llama3_rope(theta, head_dim, factors,
                           whole(own, "rope.scaling.original_context_length", 0, _WHERE, 0))
    if kind == "yarn":
        return _yarn(own, scaling, theta, factor)
    if kind == "none" or factor in (0.0, 1.0):
        return RopeConfig(theta=theta)
    return RopeConfig(theta=theta, scaling="linear", factor=factor)


def _yarn(own: Mapping[str, Any], scaling: Callable[[str, float], float], theta: float,
          factor: float) -> RopeConfig:
    """Betas and attention factor are the published config's, which llama.cpp's converter copies;
    attn_factor is llama.cpp's own, a multiple of the attention factor."""
    extrapolation = scaling("yarn_ext_factor", 1.0)
    if extrapolation >= 0 and extrapolation != 1.0:  # below 0 stands for "not set"
        raise InputError(f"the GGUF's rope.scaling.yarn_ext_factor {extrapolation:g} is not "
                         "supported; supported: 1")
    attention, extra = scaling("yarn_attn_factor", 0.0), scaling("attn_factor", 1.0)
    if extra != 1.0 and not attention:
        attention = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    key = "rope.scaling.original_context_length"
    return RopeConfig(
        theta=theta, scaling="yarn", factor=factor, attention_factor=attention * extra or None,
        original_max_position=whole(own, key, whole(own, "context_length", where=_WHERE), _WHERE),
        beta_fast=scaling("yarn_beta_fast", 32.0), beta_slow=scaling("yarn_beta_slow", 1.0))


def llama3_rope(theta: float, head_dim: int, factors: np.ndarray, original: int = 0) -> RopeConfig:
    """The llama3 scaling whose frequencies these divisors give; `original`: the length before it,
    0: not said.

    Only the divisors are in the file, and they are the same for a low and high factor and a length
    that are all twice as much: the low factor is 1. Raises InputError if no such scaling gives
    them.
    """
    plain, _ = rope_frequencies(RopeConfig(theta=theta), head_dim)
    if factors.shape == plain.shape and np.all(np.isfinite(factors) & (factors >= 1)):
        for length, high in _llama3_candidates(2 * np.pi / plain, factors.astype(np.float64),
                                               original):
            rope = RopeConfig(theta=theta, scaling="llama3", factor=float(factors.max()),
                              high_freq_factor=high, original_max_position=length)
            scaled, _ = rope_frequencies(rope, head_dim)
            if np.allclose(plain / scaled, factors, rtol=1e-3):
                return rope
    raise InputError(f"the GGUF's {ROPE_FACTORS} is not Llama 3's scaling; use the model's "
                     "safetensors")


def _llama3_candidates(wavelengths: np.ndarray, factors: np.ndarray,
                       original: int) -> Iterable[tuple[int, float]]:
    """(original length, high factor) to try: what is said, what is published, what the blended
    divisors give."""
    for length in (original, _LLAMA3_ORIGINAL):
        if length:
            yield length, _LLAMA3_HIGH
    most = factors.max()
    blended = (factors > 1 + 1e-4) & (factors < most * (1 - 1e-4))
    # any length between the last that is left alone and the first that is divided in full
    if not blended.any():
        yield math.ceil(_LLAMA3_HIGH * wavelengths[factors < 1 + 1e-4]
                        .max(initial=1.0)), _LLAMA3_HIGH
        return
    # 1 / divisor = (1 - smooth) / most + smooth, and smooth = (length / wavelength - 1) / (high -
    # 1)
    smooth = (1 / factors[blended] - 1 / most) / (1 - 1 / most)
    yield round(
        float(np.median((smooth * (_LLAMA3_HIGH - 1) + 1) * wavelengths[blended]))), _LLAMA3_HIGH
    if blended.sum() > 1:
        # length / (high - 1), -1 / (high - 1)
        slope, offset = np.polyfit(1 / wavelengths[blended], smooth, 1)
        if slope > 0 > offset:
            yield max(1, round(-slope / offset)), round(1 - 1 / offset, 4)
