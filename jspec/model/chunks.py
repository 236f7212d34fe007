"""Applying the output head to some positions at a time, so that logits [N, T, V] never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 1024  # rows x positions whose logits exist at one time: with 49,152 ids, float32, 200 MB


def split_chunks(tree: Any, chunk_tokens: int = CHUNK_TOKENS) -> Any:
    """Arrays [N, T, ...] as [chunks, N, size, ...], zero-padded along T. Chunks hold some positions of every row, so
    that a batch sharded over rows stays balanced."""
    n, t = jax.tree.leaves(tree)[0].shape[:2]
    size = min(t, max(1, chunk_tokens // n))
    chunks = -(-t // size)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * size - t), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(n, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def sum_over_chunks(fn: Callable[[Any], Any], tree: Any, chunk_tokens: int = CHUNK_TOKENS) -> Any:
    """Sum of fn over chunks of a tree of [N, T, ...], each recomputed in the backward pass. Padding is 0 (False)."""
    chunks = split_chunks(tree, chunk_tokens)
    one = jax.checkpoint(fn)
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        return one(jax.tree.map(lambda x: x[0], chunks))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, jax.tree.map(lambda x: x[0], chunks)))
    total, _ = jax.lax.scan(lambda carry, x: (jax.tree.map(jnp.add, carry, one(x)), None), zero, chunks)
    return total
