"""Queries as rows of the matrix unit: the query heads of a group beside each other, for every new
position."""

from __future__ import annotations

import jax


def pack(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, D] to [B, H_kv, T * group, D]; row r belongs to new position r // group."""
    b, new, _, d = q.shape
    return q.reshape(b, new, kv_heads, -1, d).swapaxes(1, 2).reshape(b, kv_heads, -1, d)


def unpack(packed: jax.Array, new: int) -> jax.Array:
    """The inverse of `pack`: [B, H_kv, new * group, D] to [B, new, H, D]."""
    b, kv_heads, _, d = packed.shape
    return packed.reshape(b, kv_heads, new, -1, d).swapaxes(1, 2).reshape(b, new, -1, d)
