"""Recursion over depths in training, as it is at inference (https://arxiv.org/abs/2503.01840)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jspec.model.attention import causal_attention, in_reach


def shift(x: jax.Array) -> jax.Array:
    """[B, S, D] moved one position later; position 0 has no predecessor and reads zeros."""
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def unrolled_attention(earlier: list[tuple[jax.Array, jax.Array]],
                       window: int | None = None,
                       slides: bool = False) -> Callable[..., tuple[jax.Array, None]]:
    """Attention of recursion depth d = len(earlier) + 1, as at inference, over all positions of a
    sequence at once.

    A query at p sees what a draft of depth d sees: depth 1 (from the trunk's states) up to position
    p - d + 1, and of those the `window` last (None: all), then one position each of the depths
    since, the last its own. slides: of depth 1 it sees one fewer for each depth since, but always
    the last, as P-EAGLE's trainer has it. (At inference a window shorter than a draft hides that
    too.) `earlier`: keys and values of depths 1 .. d - 1, [B, S, KV heads, head_dim], grown here.
    """
    def attend(q, k, v) -> tuple[jax.Array, None]:
        pairs = [*earlier, (k, v)]
        earlier.append((k, v))
        if len(pairs) == 1:
            return causal_attention(q, k, v, window), None
        b, s, kv_heads, hd = k.shape
        q = q.reshape(b, s, kv_heads, -1, hd) * hd**-0.5
        scores = jnp.einsum("bthgd,bshd->bhgts", q, pairs[0][0], preferred_element_type=jnp.float32)
        position = jnp.arange(s)
        since = len(pairs) - 1
        reach = max(window - since, 1) if window and slides else window
        visible = in_reach(position[None, :], position[:, None] - since, reach)
        columns = [jnp.where(visible, scores, -jnp.inf)]
        shifted = []
        for i, (key, value) in enumerate(pairs[1:]):
            back = len(pairs) - 2 - i
            key, value = (jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :s]
                          for x in (key, value))
            score = jnp.einsum("bthgd,bthd->bhgt", q, key, preferred_element_type=jnp.float32)
            columns.append(jnp.where(position >= back, score, -jnp.inf)[..., None])
            shifted.append(value)
        weights = jax.nn.softmax(jnp.concatenate(columns, axis=-1), axis=-1).astype(v.dtype)
        out = jnp.einsum("bhgts,bshd->bthgd", weights[..., :s], pairs[0][1])
        for i, value in enumerate(shifted):
            out = out + jnp.einsum("bhgt,bthd->bthgd", weights[..., s + i], value)
        return out.reshape(b, s, -1, hd), None

    return attend
