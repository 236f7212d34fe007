"""The transformer's three ways through: training (stacked, scanned), prefill and verification (unrolled, cached)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jspec.model.attention import Cache, causal_attention, to_cache
from jspec.model.layers import decoder_layer, fuse, linear, rms_norm, rope_table
from jspec.model.params import Policy
from jspec.sharding import constrain
from pallas_kernels.verify_attention import verify_attention


@struct.dataclass
class Trunk:
    """What the layers computed, in the compute dtype.

    Attributes:
      hidden: [B, T, D], final-normed: the output head's input.
      features: one [B, T, D] for each requested depth; depth i is the residual stream after i layers (0: embeddings).
    """

    hidden: jax.Array
    features: tuple[jax.Array, ...] = ()


def embed(policy: Policy, tokens: jax.Array) -> jax.Array:
    """Token embeddings [..., D] in the compute dtype."""
    return jnp.take(policy.weights["embed"], tokens, axis=0, mode="clip").astype(policy.dtype)


def logits(policy: Policy, hidden: jax.Array) -> jax.Array:
    """Next-token logits, float32 [..., V], of final-normed hidden states [..., D]."""
    with jax.named_scope("head"):
        if policy.config.tie_embeddings:
            table = policy.weights["embed"].astype(hidden.dtype)
            precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
            out = jax.lax.dot_general(hidden, table, (((hidden.ndim - 1,), (1,)), ((), ())), precision=precision,
                                      preferred_element_type=jnp.float32)
        else:
            out = linear(hidden, policy.weights["head"], out_dtype=jnp.float32)
        return constrain(out, policy.layout, "batch", *(None,) * (out.ndim - 2), "vocab")


def _final(policy: Policy, x: jax.Array, features: list[jax.Array]) -> Trunk:
    return Trunk(rms_norm(x, policy.weights["final_norm"], policy.config.rms_norm_eps), tuple(features))


def train_forward(policy: Policy, tokens: jax.Array, *, features: tuple[int, ...] = (), remat: bool = False) -> Trunk:
    """All positions of tokens int32 [B, S], causal, positions 0..S-1, differentiable. Training layout only.

    Rows are right-padded: padding can only influence positions after it. `remat` recomputes each layer in the
    backward pass, so that only one residual stream a layer is kept.
    """
    config = policy.config
    rope = rope_table(config, jnp.arange(tokens.shape[1])[None])
    x = constrain(embed(policy, tokens), policy.layout, "batch", None, None)

    def layer(carry, xs):
        x, kept = carry
        w, depth = xs
        x, _ = decoder_layer(config, fuse(config, w), x, rope, lambda q, k, v: (causal_attention(q, k, v), None))
        x = constrain(x, policy.layout, "batch", None, None)
        kept = tuple(jnp.where(depth == i, x, f) for i, f in zip(features, kept, strict=True))
        return (x, kept), None

    with jax.named_scope("trunk"):
        xs = (policy.weights["layers"], 1 + jnp.arange(config.num_layers))
        (x, kept), _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, (x, (x,) * len(features)), xs)
    return _final(policy, x, list(kept))


def _unrolled(policy: Policy, tokens: jax.Array, positions: jax.Array, features: tuple[int, ...], attend) -> tuple:
    """Run the layers one by one; `attend(i)` gives layer i's attention. Returns (Trunk, Cache)."""
    config = policy.config
    rope = rope_table(config, positions)
    x = constrain(embed(policy, tokens), policy.layout, "batch", None, None)
    residual, caches = [x], []
    for i, w in enumerate(policy.weights["layers"]):
        x, cache = decoder_layer(config, w, x, rope, attend(i))
        x = constrain(x, policy.layout, "batch", None, None)
        residual.append(x)
        caches.append(cache)
    trunk = _final(policy, x, [residual[i] for i in features])
    return trunk, Cache(tuple(k for k, _ in caches), tuple(v for _, v in caches))


def prefill(policy: Policy, tokens: jax.Array, cache_size: int, *, features: tuple[int, ...] = ()):
    """Whole prompts, tokens int32 [P, L], right-padded. Rollout layout only.

    Returns (Trunk over [P, L], Cache of `cache_size` >= L positions a row).
    """
    def attend(_):
        def causal(q, k, v):
            caches = tuple(constrain(to_cache(x, cache_size), policy.layout, "batch", "kv_heads", None, None)
                           for x in (k, v))
            return causal_attention(q, k, v), caches
        return causal

    return _unrolled(policy, tokens, jnp.arange(tokens.shape[1])[None], features, attend)


def verify(policy: Policy, tokens: jax.Array, cache: Cache, lengths: jax.Array, *, features: tuple[int, ...] = ()):
    """T new tokens a row, int32 [B, T], at positions lengths .. lengths+T-1 after the cached ones. Rollout layout only.

    Returns (Trunk over [B, T], Cache with the new keys and values written at those positions).
    """
    def attend(i):
        def ragged(q, k, v):
            out, new_k, new_v = verify_attention(q, k, v, cache.k[i], cache.v[i], lengths)
            return out, (new_k, new_v)
        return ragged

    positions = lengths[:, None] + jnp.arange(tokens.shape[1])[None]
    return _unrolled(policy, tokens, positions, features, attend)
