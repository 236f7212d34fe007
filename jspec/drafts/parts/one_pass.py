"""Drafts of one pass: decoder layers over an anchor and mask tokens, with keys and values of the
committed context from the policy's own states (DFlash, https://arxiv.org/abs/2602.06036).

The anchor is a sequence's last token; slot 0 of a draft holds its embedding, the others that of the
mask token, at the positions that follow. The states of the policy's trunk before the anchor are
fused into one context state a position, the same for every layer, from which each layer makes its
keys and values: they are cached, and grow with what is committed. Queries come from the slots.
A draft of k tokens has k slots where the anchor's own predicts the token after it
(`sample_from_anchor`), else k + 1, of which the anchor's predicts nothing. Trained on `block_size`
slots; at inference there may be fewer or more.

`config` is a `OnePassConfig`, and `w` its weights; `policy.config` must be `config.block`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jspec.arguments import flag, settle, whole, whole_numbers
from jspec.drafts.base import Draft, DraftState, Observation, Prefill
from jspec.drafts.parts.fusing import check_fused
from jspec.drafts.parts.recursion import cast_and_split
from jspec.errors import InputError
from jspec.kernels import attend as attend_cached
from jspec.model import (
    Cache,
    KeyValues,
    ModelConfig,
    ParamSpec,
    Policy,
    Trunk,
    embed,
    init_weights,
    layer_specs,
    place_on_mesh,
)
from jspec.model.layers import decoder_layer, fuse, rms_norm, rope_table, rotate
from jspec.model.linear import linear
from jspec.model.pool import append


@dataclasses.dataclass(frozen=True)
class OnePassConfig:
    """A draft's shape, and the conventions by which published ones differ.

    Attributes:
      block: the layers as a model of their own: heads, rope and widths, which need not be the
        policy's.
      aux_depths: what is fused; depth i is the policy's residual stream after i layers.
      mask_token: whose embedding, of the policy's, the slots behind the anchor read.
      block_size: slots in training.
      sample_from_anchor: the anchor's slot predicts the token after it.
      windows: of each layer, how many context positions before the anchor it sees; 0: all.
      windows_causal: in layers with a window a slot sees no later one; in the others all see all.
      vocab_size: of the reduced vocabulary, 0: the policy's. own_head: of that an output head of
        the draft's own; False: the policy's rows.
      dtype: in which a checkpoint is written.
    """

    policy: ModelConfig
    block: ModelConfig
    aux_depths: tuple[int, ...]
    mask_token: int
    block_size: int = 8
    sample_from_anchor: bool = False
    windows: tuple[int, ...] = ()
    windows_causal: bool = True
    vocab_size: int = 0
    own_head: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        label = f"{self.kind} draft: "
        settle(self, label, aux_depths=whole_numbers, mask_token=whole(), block_size=whole(2, 64),
               sample_from_anchor=flag, windows=whole_numbers, windows_causal=flag,
               vocab_size=whole(), own_head=flag)
        if self.windows and len(self.windows) != self.block.num_layers:
            raise InputError(f"{label}windows has {len(self.windows)} numbers, and there are "
                             f"{self.block.num_layers} layers; give one for each layer")
        check_mask_token(self.kind, self.policy, self.mask_token)
        check_fused(self.kind, self.policy, self.block, self.aux_depths)

    @property
    def kind(self) -> str:
        """The drafter's name, for messages."""
        return type(self).__name__.removesuffix("Config").lower()

    @property
    def idle(self) -> int:
        """Slots of a draft that predict nothing: the anchor's, or none."""
        return int(not self.sample_from_anchor)

    @property
    def predicted(self) -> int:
        """Tokens that the slots of training predict."""
        return self.block_size - self.idle

    def reach(self, layer: int) -> dict[str, Any]:
        """What the slots see in a layer, as arguments of `verify_attention`."""
        window = self.windows[layer] if self.windows else 0
        causal = bool(window) and self.windows_causal
        return {"window": window or None, "together": "causal" if causal else "whole"}


def default_depths(num_layers: int) -> tuple[int, ...]:
    """Five depths from the policy's second layer to its second last, as published; of a policy of
    fewer layers as many as there are."""
    last = max(num_layers - 2, 1)
    first = min(2, last)
    count = min(5, last - first + 1)
    steps = [first + round(i * (last - first) / max(count - 1, 1)) for i in range(count)]
    return tuple(dict.fromkeys(steps))


def check_mask_token(kind: str, policy: ModelConfig, mask_token: int) -> None:
    """Raise InputError where the policy has no embedding of it; `kind` is the drafter's name."""
    if mask_token >= policy.vocab_size:
        raise InputError(f"{kind} draft: mask_token = {mask_token} is outside the policy's "
                         f"vocabulary of {policy.vocab_size}")


def default_mask_token(policy: ModelConfig) -> int:
    """An id that no text has: the first without a token, else the one that pads."""
    return policy.tokenless[0][0] if policy.tokenless else policy.pad_token


def default_block(policy: ModelConfig, layers: int) -> ModelConfig:
    """`layers` dense layers of the policy's sizes and rope, as Qwen3 has them."""
    return dataclasses.replace(policy, family="qwen3", num_layers=layers, tie_embeddings=False,
                               qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=True,
                               stop_tokens=(), pad_token=0, tokenless=(), experts=None)


def specs(config: OnePassConfig) -> dict:
    """The parameters; embedding, and output head unless it is the draft's own, are the policy's."""
    d, n = config.block.hidden_size, len(config.aux_depths)
    norm = ParamSpec((d,), ("norm",), "ones")
    layer = layer_specs(config.block)
    for name in ("o", "down"):
        layer[name] = dataclasses.replace(layer[name], init="zeros")
    out: dict[str, Any] = {"fc": ParamSpec((d, n * d), ("embed", None)), "hidden_norm": norm,
                           "layers": (layer,) * config.block.num_layers, "norm": norm}
    if config.own_head:
        out["head"] = ParamSpec((config.vocab_size, d), (None, "embed"))
    return out


def fresh_weights(policy: Policy, tree: dict, config: OnePassConfig, key: jax.Array) -> dict:
    """Weights from random initialisation, on the mesh of `jax.set_mesh` if there is one. The layers
    start as the policy's last ones, and the context as the last of the fused states, normed as they
    norm it: their keys and values of it are near the policy's own."""
    made, count = policy.config, config.block.num_layers

    def fresh(key: jax.Array, layers: dict, final_norm: jax.Array) -> dict:
        weights = init_weights(tree, key, made.initializer_range)
        started = []
        for i, layer in enumerate(weights["layers"]):
            # of a sparse layer there is no dense feed-forward to begin with
            last = {name: x[max(len(x) - count + i, 0)] for name, x in layers.items()
                    if name in layer}
            if not made.qk_norm:
                last |= {f"{name}_norm": size_of_heads(last[name], last["attn_norm"],
                                                       made.head_dim) for name in "qk"}
            started.append(layer | last)
        last_only = jnp.eye(len(config.aux_depths), dtype=jnp.float32)[-1]
        fc = jnp.kron(last_only, jnp.eye(made.hidden_size, dtype=jnp.float32))
        return {**weights, "fc": weights["fc"] + fc, "layers": tuple(started),
                "hidden_norm": started[0]["attn_norm"] + 0, "norm": final_norm + 0}

    return place_on_mesh(fresh, tree, config.block)(key, policy.weights["layers"],
                                                   policy.weights["final_norm"])


def size_of_heads(w: jax.Array, norm: jax.Array, head_dim: int) -> jax.Array:
    """[head_dim], the root mean square over heads that a projection w [heads x head_dim, D] makes
    of what was normed with the scale [D], were its entries independent: a norm of heads with that
    scale leaves them, on average, as they are."""
    square = jnp.sum(jnp.square(w * norm), axis=-1)
    return jnp.sqrt(square.reshape(-1, head_dim).mean(0))


def prepare(policy: Policy, draft: Draft) -> dict:
    """The weights cast to the policy's compute dtype, sharded as the policy is, and fused; the
    projections of keys and values apart as well, for the context."""
    weights, config = cast_and_split(policy, draft), draft.config
    layers = tuple({**fuse(config.block, w, policy.layout), "k": w["k"], "v": w["v"]}
                   for w in weights["layers"])
    return {**weights, "layers": layers}


def inside(policy: Policy, config: OnePassConfig) -> Policy:
    """The policy with the layers' config in its own's place: what heads and rope are read from."""
    return policy.replace(config=config.block)


def fused(config: OnePassConfig, w: dict, trunk: Trunk) -> jax.Array:
    """The trunk's streams [B, T, D] at the auxiliary depths as one context state [B, T, D]."""
    x = linear(jnp.concatenate(trunk.features, axis=-1), w["fc"])
    return rms_norm(x, w["hidden_norm"], config.block.rms_norm_eps)


def keys_values(config: OnePassConfig, w: dict, context: jax.Array,
                positions: jax.Array) -> KeyValues:
    """Of every layer, rotated keys and values [B, T, KV heads, head_dim] of context states
    [B, T, D] at positions int32 [B or 1, T]."""
    model, rope = config.block, rope_table(config.block, positions)
    shape = (*context.shape[:2], model.num_kv_heads, model.head_dim)
    out = []
    for layer in w["layers"]:
        k, v = (linear(context, layer[name], layer.get(name + "_bias")).reshape(shape)
                for name in "kv")
        k = rms_norm(k, layer["k_norm"], model.rms_norm_eps) if model.qk_norm else k
        out.append((rotate(k, rope), v))
    return tuple(out)


def slots(policy: Policy, config: OnePassConfig, w: dict, anchors: jax.Array, at: jax.Array,
          count: int, attend: Callable[[int], Callable]) -> tuple[jax.Array, list[Any]]:
    """The normed states [B, A x count, D] of `count` slots behind each of A anchors a row, tokens
    and positions int32 [B, A], and what `attend(layer)` returned beside its output."""
    mask = jnp.full((*anchors.shape, count - 1), config.mask_token, anchors.dtype)
    tokens = jnp.concatenate([anchors[..., None], mask], axis=-1).reshape(anchors.shape[0], -1)
    positions = (at[..., None] + jnp.arange(count)).reshape(tokens.shape)
    rope, x, kept = rope_table(config.block, positions), embed(policy, tokens), []
    for i, layer in enumerate(w["layers"]):
        x, cache, _ = decoder_layer(config.block, layer, x, rope, attend(i))
        kept.append(cache)
    return rms_norm(x, w["norm"], config.block.rms_norm_eps), kept


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[dict, KeyValues]:
    """The context's keys and values over the prompts. (That of a prompt's last token is overwritten
    by the first draft's anchor, and made again when it is committed.)"""
    config, w = draft.config, draft.weights
    positions = jnp.arange(prefill.tokens.shape[1])[None]
    return {}, keys_values(config, w, fused(config, w, prefill.trunk), positions)


def draft_states(policy: Policy, config: OnePassConfig, w: dict, cache: Cache, pending: jax.Array,
                 lengths: jax.Array, k: int) -> tuple[jax.Array, Cache]:
    """The states [B, idle + k, D] of all slots, of which the last k predict the k tokens after
    `pending` int32 [B], the last one of rows of `lengths` int32 [B], and the cache, whose positions
    from lengths - 1 on hold slots."""
    policy, count = inside(policy, config), k + config.idle
    pools = [(k_pool, v_pool) for k_pool, v_pool in zip(cache.k, cache.v, strict=True)]

    def attend(i: int) -> Callable:
        def ragged(q, k, v) -> tuple[jax.Array, list[jax.Array]]:
            out, *new = attend_cached(policy, q, k, v, *pools[i], cache.table, lengths - 1,
                                      **config.reach(i))
            return out, new
        return ragged

    states, new = slots(policy, config, w, pending[:, None], lengths[:, None] - 1, count, attend)
    cache = cache.replace(k=tuple(k for k, _ in new), v=tuple(v for _, v in new))
    return states, cache


def observe(policy: Policy, draft: Draft, state: DraftState,
            observation: Observation) -> DraftState:
    """Keys and values of the verified positions from the verifier's states. (Those of rejected
    tokens are overwritten by the next draft's slots, which begin before them.)"""
    config, w, first = draft.config, draft.weights, observation.lengths - 1
    context = fused(config, w, observation.trunk)
    positions = first[:, None] + jnp.arange(context.shape[1])
    return state.replace(cache=append(state.cache, keys_values(config, w, context, positions),
                                      first))
