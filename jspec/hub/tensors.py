"""What a policy's parameters are stored as: the tensors of checkpoints and of GGUF files by name,
and each one's place in our arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from jspec.errors import InputError
from jspec.model.config import ModelConfig

if TYPE_CHECKING:
    from jspec.model.params import ParamSpec


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint and where it goes.

    `name` is transformers' and safetensors' name, `gguf` llama.cpp's ("" where it has none); `key`
    is the path in `Policy.weights` (of an MTP head's: in the draft's). `place` is where it lies
    along that array's leading axes: of a layer's (which of those that have it), then expert, then
    half, as far as there are such axes. `shape` is without them.
    """

    name: str
    gguf: str
    key: tuple[str | int, ...]
    place: tuple[int, ...]
    shape: tuple[int, ...]


# what tensors are called in a checkpoint and in a GGUF: those of a layer after _PREFIXES
_PREFIXES = ("model.layers.{layer}.", "blk.{layer}.")
_TOP = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}
_LAYER = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "o": ("self_attn.o_proj.weight", "attn_output.weight"),
    "q_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "k_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "v_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "o_bias": ("self_attn.o_proj.bias", "attn_output.bias"),
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "mlp_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
    "gate_bias": ("mlp.gate_proj.bias", "ffn_gate.bias"),
    "up_bias": ("mlp.up_proj.bias", "ffn_up.bias"),
    "down_bias": ("mlp.down_proj.bias", "ffn_down.bias"),
    "router": ("mlp.gate.weight", "ffn_gate_inp.weight"),
}
# of a parameter with an axis of experts: the names of its halves, or of all of it
_EXPERT = {
    "expert_gate_up": (("mlp.experts.{expert}.gate_proj.weight", "ffn_gate.{expert}.weight"),
                       ("mlp.experts.{expert}.up_proj.weight", "ffn_up.{expert}.weight")),
    "expert_down": (("mlp.experts.{expert}.down_proj.weight", "ffn_down.{expert}.weight"),),
}
# how tensors end that hold those of all experts, one below the other: transformers' own of today,
# which `save_pretrained` writes if asked to, and llama.cpp's; of which parameter, and its names
_STACKED = {
    "mlp.experts.gate_up_proj": ("expert_gate_up", [hf for hf, _ in _EXPERT["expert_gate_up"]]),
    "mlp.experts.down_proj": ("expert_down", [hf for hf, _ in _EXPERT["expert_down"]]),
    "ffn_gate_exps.weight": ("expert_gate_up", [_EXPERT["expert_gate_up"][0][1]]),
    "ffn_up_exps.weight": ("expert_gate_up", [_EXPERT["expert_gate_up"][1][1]]),
    "ffn_down_exps.weight": ("expert_down", [_EXPERT["expert_down"][0][1]]),
}


def layer_tensor(key: str) -> str:
    """What checkpoints call a dense layer's parameter `key` of `layer_specs`, below the layer's own
    prefix."""
    return _LAYER[key][0]


def stored_tensors(config: ModelConfig) -> list[StoredTensor]:
    """Every tensor that a checkpoint of this config holds, layer by layer and expert by expert."""
    from jspec.model.params import param_specs, stacks

    specs, out = param_specs(config), []
    for key, (name, gguf) in _TOP.items():
        if key in specs:
            out.append(StoredTensor(name, gguf, (key,), (), specs[key].shape))
    held = {key: (spec, {layer: i for i, layer in enumerate(having)})
            for key, (spec, having) in stacks(config).items()}
    for layer in range(config.num_layers):
        for key, (spec, at) in held.items():
            if layer in at:
                out += _layer_tensors(key, spec, layer, at[layer])
    return out


def _layer_tensors(key: str, spec: ParamSpec, layer: int, at: int) -> list[StoredTensor]:
    """What a layer's parameter is stored as: one tensor, or one for each expert and half."""
    def stored(names: tuple[str, str], place: tuple[int, ...]) -> StoredTensor:
        hf, gguf = ((prefix + name).format(layer=layer, expert=place[0] if place else None)
                    for prefix, name in zip(_PREFIXES, names, strict=True))
        return StoredTensor(hf, gguf, ("layers", key), (at, *place), spec.shape[len(place):])

    if key not in _EXPERT:
        return [stored(_LAYER[key], ())]
    halves = _EXPERT[key]
    return [stored(names, (expert, half) if len(halves) > 1 else (expert,))
            for expert in range(spec.shape[0]) for half, names in enumerate(halves)]


class Divisible(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""

    def part(self, index: int, shape: tuple[int, ...]) -> Self:
        """The index-th of the tensors of this shape that it is made of, one below the other."""


T = TypeVar("T", bound=Divisible)


def unstacked(label: str, tensors: Mapping[str, T], config: ModelConfig) -> dict[str, T]:
    """A file's tensors by name, with those of single experts in the place of stacked ones.

    Raises InputError for a stacked one of another shape than the config says, and for what is there
    by itself and stacked.
    """
    from jspec.model.params import expert_specs

    if config.experts is None:
        return dict(tensors)
    out: dict[str, T] = {}
    specs = expert_specs(config)
    for name, tensor in tensors.items():
        end = next((end for end in _STACKED if name.endswith(f".{end}")), None)
        parts = {name: tensor}
        if end is not None:
            key, names = _STACKED[end]
            (count, *_, rows, columns) = specs[key].shape
            if tuple(tensor.shape) != (count, len(names) * rows, columns):
                raise InputError(f"{label}: tensor {name} has shape {list(tensor.shape)}, but the "
                                 f"config says {[count, len(names) * rows, columns]}")
            parts = {name.removesuffix(end) + own.format(expert=expert):
                     tensor.part(expert * len(names) + half, (rows, columns))
                     for expert in range(count) for half, own in enumerate(names)}
        both = out.keys() & parts
        if both:
            raise InputError(f"{label}: tensor {min(both)} is stored twice, by itself and in one "
                             "of all experts; keep one")
        out |= parts
    return out
