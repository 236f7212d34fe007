"""Causal attention over whole sequences. Verification against a cache is a kernel:
`pallas_kernels`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

QUERY_BLOCK = 512


def _in_query_blocks(q: jax.Array, k: jax.Array, v: jax.Array,
                     visible: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Attention of q [B, T, H, D] to k, v [B, S, H_kv, D], in blocks where T is large, so that
    scores take S x QUERY_BLOCK and not S x T. `visible(rows)` says what queries int32 [rows] may
    see, bool [B or 1, rows, S]."""
    length = q.shape[1]
    if length <= 2 * QUERY_BLOCK:
        return jax.nn.dot_product_attention(q, k, v, mask=visible(jnp.arange(length))[:, None])
    blocks = -(-length // QUERY_BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, blocks * QUERY_BLOCK - length), (0, 0), (0, 0)))
    padded = padded.reshape(q.shape[0], blocks, QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attended(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, index = block
        rows = index * QUERY_BLOCK + jnp.arange(QUERY_BLOCK)
        return jax.nn.dot_product_attention(queries, k, v, mask=visible(rows)[:, None])

    out = jax.lax.map(attended, (padded, jnp.arange(blocks)))
    return out.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array,
                     window: int | None = None) -> jax.Array:
    """Causal grouped-query attention, q [B, S, H, D], k and v [B, S, H_kv, D] -> [B, S, H, D].

    window: a position sees itself and the window - 1 before it; None: all before it.
    """
    return _in_query_blocks(q, k, v, lambda rows: in_reach(jnp.arange(k.shape[1]), rows[:, None],
                                                           window)[None])


def in_reach(position: jax.Array, last: jax.Array, window: int | None) -> jax.Array:
    """Whether `position` is visible to a query that sees up to `last`, and of those the window last
    ones; int32 that broadcast, to bool."""
    visible = position <= last
    return visible if window is None else visible & (position > last - window)


def continued_attention(q: jax.Array, k: jax.Array, v: jax.Array, prompt_k: jax.Array,
                        prompt_v: jax.Array, prompt_lengths: jax.Array) -> jax.Array:
    """Attention of sequences that continue a shared prompt, q [N, T, H, D], k and v [N, T, H_kv, D]
    -> [N, T, H, D].

    prompt_k, prompt_v: [P, L, H_kv, D], of the prompts, right-padded, prompt_lengths int32 [P]. Row
    i of N continues prompt i // (N // P): it sees all of that, and itself causally.
    """
    group, length = q.shape[0] // prompt_k.shape[0], prompt_k.shape[1]
    k, v = (jnp.concatenate([jnp.repeat(a, group, axis=0), b], axis=1)
            for a, b in ((prompt_k, k), (prompt_v, v)))
    in_prompt = jnp.arange(length) < jnp.repeat(prompt_lengths, group)[:, None]

    def visible(rows) -> jax.Array:
        own = jnp.arange(q.shape[1]) <= rows[:, None]
        shape = (q.shape[0], rows.shape[0])
        return jnp.concatenate([jnp.broadcast_to(in_prompt[:, None], (*shape, length)),
                                jnp.broadcast_to(own[None], (*shape, q.shape[1]))], axis=-1)

    return _in_query_blocks(q, k, v, visible)
