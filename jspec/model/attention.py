"""Causal attention over whole sequences, and the per-layer KV cache. Verification is a kernel: `pallas_kernels`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

QUERY_BLOCK = 512


@struct.dataclass
class Cache:
    """Keys and values of committed tokens, one array a layer, [B, kv_heads, S, head_dim] in the compute dtype.

    Positions at and beyond a row's length hold garbage that the next write at that position replaces.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array | int) -> jax.Array:
    """Attention of q [B, T, H, D], the queries at positions first..first+T-1, to k, v [B, S, H_kv, D]."""
    mask = jnp.arange(k.shape[1])[None, :] <= first + jnp.arange(q.shape[1])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal grouped-query attention, q [B, S, H, D], k and v [B, S, H_kv, D] -> [B, S, H, D].

    Queries go in blocks when S is large, so that scores take S x QUERY_BLOCK and not S x S.
    """
    length = q.shape[1]
    if length <= 2 * QUERY_BLOCK:
        return _attend(q, k, v, 0)
    blocks = -(-length // QUERY_BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, blocks * QUERY_BLOCK - length), (0, 0), (0, 0)))
    padded = padded.reshape(q.shape[0], blocks, QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)
    one = jax.checkpoint(lambda args: _attend(args[0], k, v, args[1] * QUERY_BLOCK))
    out = jax.lax.map(one, (padded, jnp.arange(blocks)))
    return out.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def to_cache(x: jax.Array, cache_size: int) -> jax.Array:
    """Keys or values [B, L, kv_heads, head_dim] laid out as a cache [B, kv_heads, cache_size, head_dim]."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, cache_size - x.shape[1]), (0, 0)))
