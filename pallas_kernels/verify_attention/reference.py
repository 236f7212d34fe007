"""Plain JAX: the specification, and what the CPU runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.verify_attention.packing import pack, unpack
from pallas_kernels.verify_attention.reach import seen


def _write(pool: jax.Array, new: jax.Array, block: jax.Array, offset: jax.Array) -> jax.Array:
    """Write new [B, T, H_kv, D] into pool [blocks, H_kv, size, D] at block and offset, int32
    [B, T]; no block: nowhere. A scatter and no `where`, which would copy the pool."""
    return pool.at[block, :, offset].set(new.astype(pool.dtype), mode="drop")


def _online_step(carry: tuple[jax.Array, jax.Array, jax.Array], q: jax.Array, k: jax.Array,
                 v: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block of online softmax (https://arxiv.org/abs/1805.02867), float32. q [B, H_kv, R, D], k, v
    [B, H_kv, C, D], visible bool [B, 1, R, C]; carried are the largest score and the sum
    [B, H_kv, R, 1], and the output [B, H_kv, R, D].
    """
    top, total, out = carry
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bhrd,bhcd->bhrc", q, k, precision=precision,
                        preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - new_top)
    scale = jnp.exp(top - new_top)
    values = jnp.einsum("bhrc,bhcd->bhrd", weights.astype(v.dtype), v, precision=precision,
                        preferred_element_type=jnp.float32)
    return new_top, total * scale + weights.sum(-1, keepdims=True), out * scale + values


def verify_attention(q: jax.Array, k: jax.Array, v: jax.Array, pool_k: jax.Array, pool_v: jax.Array,
                     table: jax.Array, lengths: jax.Array, *,
                     window: int | None = None,
                     together: str | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.verify_attention`: q [B, T, H, D], k and v [B, T, H_kv, D], pools
    [blocks, H_kv, size, D], table int32 [B, M], lengths int32 [B]. Blocks beyond the longest live
    row are not read."""
    t, h = q.shape[1:3]
    blocks, kv_heads, size = pool_k.shape[:3]
    live = table[:, 0] < blocks
    new = lengths[:, None] + jnp.arange(t)
    block = jnp.where(live[:, None], jnp.take_along_axis(table, new // size, axis=1, mode="clip"),
                      blocks)
    pool_k, pool_v = (_write(pool, x, block, new % size) for pool, x in ((pool_k, k), (pool_v, v)))
    packed = pack(q, kv_heads)
    offset = jnp.repeat(jnp.arange(t), h // kv_heads)[:, None]
    table = jnp.minimum(table, blocks - 1)

    def step(i, carry) -> tuple[jax.Array, jax.Array, jax.Array]:
        at = jax.lax.dynamic_index_in_dim(table, i, axis=1, keepdims=False)
        keys, values = (pool.at[at].get(mode="promise_in_bounds") for pool in (pool_k, pool_v))
        position = i * size + jnp.arange(size)
        visible = seen(position, lengths[:, None, None, None], offset, t, window, together)
        return _online_step(carry, packed, keys, values, visible)

    # -1e30 and not -inf: a row whose first block is all masked must not compute inf - inf
    carry = (jnp.full((*packed.shape[:3], 1), -1e30, jnp.float32),
             jnp.zeros((*packed.shape[:3], 1), jnp.float32), jnp.zeros(packed.shape, jnp.float32))
    if table.shape[1] == 1:
        carry = step(0, carry)
    else:
        longest = jnp.max(jnp.where(live, lengths, 0)) + t
        carry = jax.lax.fori_loop(0, (longest + size - 1) // size, step, carry)
    out = jnp.where(live[:, None, None, None], carry[2] / carry[1], 0).astype(q.dtype)
    return unpack(out, t), pool_k, pool_v
