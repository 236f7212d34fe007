"""Drafts of one pass in training: anchors along whole sequences, each with its slots
(`parts.one_pass`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jspec.drafts.base import DraftBatch
from jspec.drafts.parts.one_pass import OnePassConfig, fused, inside, keys_values, slots
from jspec.model import Policy
from jspec.model.attention import QUERY_BLOCK


def spread(config: OnePassConfig, batch: DraftBatch) -> tuple[jax.Array, DraftBatch]:
    """Anchors so that each trained token is predicted by one slot: their positions int32 [B, A],
    the first of a row chosen by its tokens and `turn`; and the batch with its answers begun that
    much earlier, [B, A x predicted], so that `predicting` gives what the slots stand at."""
    n, t = config.predicted, batch.mask.shape[1]
    own = jnp.sum(batch.tokens, axis=1, dtype=jnp.int32)
    early = (own + batch.turn) % n
    count = -(-(t + n - 1) // n)
    begin = batch.response_start - early
    at = begin[:, None] - 1 + n * jnp.arange(count)
    index = jnp.arange(count * n) - early[:, None]
    # an anchor before the first token is none
    there = (index >= 0) & (index < t) & jnp.repeat(at >= 0, n, axis=1)

    def moved(x: jax.Array, fill: Any) -> jax.Array:
        taken = jnp.take_along_axis(x, jnp.clip(index, 0, t - 1), axis=1)
        return jnp.where(there, taken, jnp.asarray(fill, x.dtype))

    return at, batch.replace(response_start=begin, mask=moved(batch.mask, False),
                             logprobs=moved(batch.logprobs, 0))


def slot_states(policy: Policy, config: OnePassConfig, w: dict, batch: DraftBatch,
                at: jax.Array) -> jax.Array:
    """The normed states [B, A, block_size, D] of all slots behind anchors at positions int32
    [B, A], over whole sequences."""
    policy = inside(policy, config)
    context = keys_values(config, w, fused(config, w, batch.trunk),
                          jnp.arange(batch.tokens.shape[1])[None])
    pending = jnp.take_along_axis(batch.tokens, at, axis=1, mode="clip")

    def attend(i: int) -> Callable:
        def anchored(q, k, v) -> tuple[jax.Array, None]:
            return anchored_attention(q, k, v, *context[i], at, **config.reach(i)), None
        return anchored

    states, _ = slots(policy, config, w, pending, at, config.block_size, attend)
    return states.reshape(*at.shape, config.block_size, -1)


def predicting(config: OnePassConfig, x: jax.Array) -> jax.Array:
    """Of [B, A, block_size, ...] the slots that predict, [B, A x predicted, ...]."""
    b, anchors, _, *rest = x.shape
    return x[:, :, config.idle:].reshape(b, anchors * config.predicted, *rest)


def anchored_attention(q: jax.Array, k: jax.Array, v: jax.Array, context_k: jax.Array,
                       context_v: jax.Array, anchors: jax.Array, *, window: int | None,
                       together: str | None) -> jax.Array:
    """Attention of the slots of A drafts a row, q [B, A x slots, H, D], to the context before their
    anchors, [B, S, H_kv, D] at positions int32 [B, A], and to each other, k and v
    [B, A x slots, H_kv, D], as `reach` says. In parts where there are many, so that scores take
    S x QUERY_BLOCK."""
    b, drafts = anchors.shape
    size = q.shape[1] // drafts
    groups = q.shape[2] // k.shape[2]
    q = q.reshape(b, drafts, size, k.shape[2], groups, -1) * q.shape[-1] ** -0.5
    k, v = (x.reshape(b, drafts, size, *x.shape[2:]) for x in (k, v))
    own = jnp.tril(jnp.ones((size, size), bool)) if together == "causal" else True
    position = jnp.arange(context_k.shape[1])

    def attended(part: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, at = part
        before = position < at[..., None]
        if window is not None:
            before &= position >= at[..., None] - window
        to_context = jnp.einsum("bawhgd,bshd->bhgaws", q, context_k,
                                preferred_element_type=jnp.float32)
        to_slots = jnp.einsum("bawhgd,bauhd->bhgawu", q, k, preferred_element_type=jnp.float32)
        scores = jnp.concatenate([
            jnp.where(before[:, None, None, :, None], to_context, -jnp.inf),
            jnp.where(own, to_slots, -jnp.inf)], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        split = context_k.shape[1]
        return (jnp.einsum("bhgaws,bshd->bawhgd", weights[..., :split], context_v)
                + jnp.einsum("bhgawu,bauhd->bawhgd", weights[..., split:], v))

    out = _in_parts(attended, (q, k, v, anchors), -(-drafts * size // (2 * QUERY_BLOCK)))
    return out.reshape(b, drafts * size, -1, q.shape[-1])


def _in_parts(fn: Callable[[Any], jax.Array], tree: Sequence[jax.Array], parts: int) -> jax.Array:
    """fn over arrays [B, A, ...] in so many parts of A, one after the other, each computed again in
    the backward pass."""
    if parts == 1:
        return fn(tree)
    drafts = tree[0].shape[1]
    size = -(-drafts // parts)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, parts * size - drafts), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], parts, size, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(jax.checkpoint(fn), tuple(map(split, tree)))
    return out.swapaxes(0, 1).reshape(out.shape[1], -1, *out.shape[3:])[:, :drafts]
