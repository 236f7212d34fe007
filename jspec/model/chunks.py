"""Applying the output head to some positions at a time, so that logits [N, T, V] never exist at
once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# rows x positions whose logits exist at one time: with 49,152 ids, float32, 200 MB
CHUNK_TOKENS = 1024


def split_chunks(tree: Any, chunk_tokens: int = CHUNK_TOKENS) -> Any:
    """Arrays [N, T, ...] as [chunks, N, size, ...], zero-padded along T. Chunks hold some positions
    of every row, so that a batch sharded over rows stays balanced."""
    n, t = jax.tree.leaves(tree)[0].shape[:2]
    size = min(t, max(1, chunk_tokens // n))
    chunks = -(-t // size)

    def split(x) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * size - t), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(n, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def map_chunks(fn: Callable[[Any], Any], tree: Any, chunk_tokens: int = CHUNK_TOKENS) -> Any:
    """fn over chunks of a tree of [N, T, ...], one after the other; its results along a new leading
    axis.

    Each is recomputed in the backward pass, unless there is one only: then nothing could be saved
    by it.
    """
    chunks = split_chunks(tree, chunk_tokens)
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], fn(jax.tree.map(lambda x: x[0], chunks)))
    return jax.lax.scan(lambda _, chunk: (None, jax.checkpoint(fn)(chunk)), None, chunks)[1]


def sum_over_chunks(fn: Callable[[Any], Any], tree: Any, chunk_tokens: int = CHUNK_TOKENS) -> Any:
    """The sum of `map_chunks`. Padding is 0 (False)."""
    return jax.tree.map(lambda x: x.sum(0), map_chunks(fn, tree, chunk_tokens))
