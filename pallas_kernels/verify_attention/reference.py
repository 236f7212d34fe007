"""Plain JAX: the specification, and what the CPU runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.verify_attention.packing import pack, unpack

KV_BLOCK = 128


def _write(cache: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """Write new [B, T, H_kv, D] into cache [B, H_kv, S, D] at each row's length."""
    def one(row_cache, row, length):
        return jax.lax.dynamic_update_slice_in_dim(row_cache, row, length, axis=1)
    return jax.vmap(one)(cache, new.swapaxes(1, 2).astype(cache.dtype), lengths)


def _online_step(carry, q, k, v, visible):
    """Block of online softmax (https://arxiv.org/abs/1805.02867), float32. q [B, H_kv, R, D], k, v [B, H_kv, C, D]."""
    top, total, out = carry
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bhrd,bhcd->bhrc", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - new_top)
    scale = jnp.exp(top - new_top)
    values = jnp.einsum("bhrc,bhcd->bhrd", weights.astype(v.dtype), v, precision=precision,
                        preferred_element_type=jnp.float32)
    return new_top, total * scale + weights.sum(-1, keepdims=True), out * scale + values


def verify_attention(q, k, v, cache_k, cache_v, lengths, *, window=None):
    """See `api.verify_attention`. Blocks beyond the longest live row are not read."""
    t, h = q.shape[1:3]
    kv_heads, size = cache_k.shape[1], cache_k.shape[2]
    cache_k, cache_v = _write(cache_k, k, lengths), _write(cache_v, v, lengths)
    packed = pack(q, kv_heads)
    last = jnp.repeat(lengths[:, None] + jnp.arange(t)[None], h // kv_heads, axis=1)[:, None, :, None]
    block = min(KV_BLOCK, size)

    def step(i, carry):
        # the last block of a cache that no block divides starts early; what was already seen is masked out
        start = jnp.minimum(i * block, size - block)
        position = start + jnp.arange(block)
        k_block = jax.lax.dynamic_slice_in_dim(cache_k, start, block, axis=2)
        v_block = jax.lax.dynamic_slice_in_dim(cache_v, start, block, axis=2)
        visible = (position >= i * block) & (position <= last)
        if window is not None:
            visible &= position > last - window
        return _online_step(carry, packed, k_block, v_block, visible)

    # -1e30 and not -inf: a row whose first block is all masked must not compute inf - inf
    carry = (jnp.full((*packed.shape[:3], 1), -1e30, jnp.float32), jnp.zeros((*packed.shape[:3], 1), jnp.float32),
             jnp.zeros(packed.shape, jnp.float32))
    if size == block:
        carry = step(0, carry)
    else:
        carry = jax.lax.fori_loop(0, (jnp.max(lengths) + t + block - 1) // block, step, carry)
    return unpack((carry[2] / carry[1]).astype(q.dtype), t), cache_k, cache_v
