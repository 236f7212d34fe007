"""Blocks that draft recursively: one reads the states of the depth before, and keeps keys and
values of its own.

A drafter hands over its blocks: entry i reads hidden [B, T, D] of the position before tokens
[B, T], and its state predicts the token after. The first depths have a block each; the last block
serves all the depths after it too (https://arxiv.org/abs/2503.01840). `entries` is how many entries
a row's caches hold. What a depth drafted is overwritten once the verifier's states are known.

A further block's first entry has no state of the block before it: it reads zeros, or, where blocks
are `late`, is left out, and each block's entries begin one token after those of the block before.

`policy` is read for what the blocks are computed in and where: its config must have the blocks'
heads and rope.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jspec.drafts.base import Draft, DraftState, Observation, Proposal, Sampler
from jspec.drafts.parts.unroll import shift, unrolled_attention
from jspec.kernels import attend as attend_cached
from jspec.model import Cache, KeyValues, Policy
from jspec.model.attention import causal_attention
from jspec.model.layers import rope_table
from jspec.sharding import constrain, constrain_tree


class Block(NamedTuple):
    """One decoder layer or several.

    Attributes:
      run: (hidden, tokens, rope, attends) -> (states, caches); `attends` has one attention for each
        of its layers, and `caches` what each of them returned.
      windows: one for each of its layers, for a block that serves every depth: of the entries made
        from the trunk's states its attention sees the last so many (None: all of them), and at
        every depth those of the depths before, as the block's trainer has it.
    """

    run: Callable[..., tuple[jax.Array, list[Any]]]
    windows: tuple[int | None, ...] = (None,)


Rows = tuple[jax.Array, ...]
"""Of every block the state [B, 1, D] at a row's last entry."""


def cast_and_split(policy: Policy, draft: Draft) -> dict:
    """A draft's weights as a rollout uses them: in the policy's compute dtype, and split over the
    mesh as the policy is."""
    drafter, config = draft.drafter, draft.config
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    return constrain_tree(weights, drafter.specs(config), drafter.model(config), policy.layout)


def next_tokens(tokens: jax.Array) -> jax.Array:
    """Tokens [B, S] by entry, where the first token has none: moved one position earlier. Nothing
    reads the last."""
    return jnp.pad(tokens, ((0, 0), (0, 1)))[:, 1:]


def start(policy: Policy, blocks: Sequence[Block], hidden: jax.Array, tokens: jax.Array,
          entries: jax.Array, late: bool = False) -> tuple[Rows, KeyValues]:
    """Of every block, its state [P, 1, D] at the last of entries int32 [P], zeros where there are
    none, and of each of its layers the keys and values over hidden [P, L, D] and tokens [P, L]."""
    rope = rope_table(policy.config, jnp.arange(tokens.shape[1])[None])

    def attention(window: int | None) -> Callable:
        return lambda q, k, v: (causal_attention(q, k, v, window), (k, v))

    rows: list[jax.Array] = []
    kept: list[tuple[jax.Array, jax.Array]] = []
    for block in blocks:
        states, pairs = block.run(hidden, tokens, rope, [attention(w) for w in block.windows])
        at = jnp.maximum(entries - 1, 0)[:, None, None]
        rows.append(jnp.where(entries[:, None, None] > 0, jnp.take_along_axis(states, at, axis=1),
                              0))
        kept += pairs
        if late:
            hidden, tokens, entries = states, next_tokens(tokens), entries - 1
        else:
            hidden = shift(states)
    return tuple(rows), tuple(kept)


def _earlier(x: jax.Array, by: jax.Array) -> jax.Array:
    """x [N, T, ...] moved by int32 [N] positions to the front, the rest garbage."""
    at = (jnp.arange(x.shape[1]) + by[:, None]).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, at, axis=1, mode="clip")


def extend(policy: Policy, blocks: Sequence[Block], index: int, cache: Cache, hidden: jax.Array,
           tokens: jax.Array, entries: jax.Array, late: bool,
           drafted: int = 0) -> tuple[jax.Array, Cache]:
    """Run tokens int32 [N, T] as entries entries .. entries + T - 1 of a block, writing its keys
    and values. drafted: how many of the entries before them are of drafted tokens, which no window
    counts. States where a late block has no entry are zeros."""
    block, absent = blocks[index], None
    if late and index:
        absent = jnp.maximum(index - entries, 0)
        entries = jnp.maximum(entries - index, 0)
        hidden, tokens = _earlier(hidden, absent), _earlier(tokens, absent)
    rope = rope_table(policy.config, entries[:, None] + jnp.arange(tokens.shape[1])[None])
    at = sum(len(before.windows) for before in blocks[:index])

    def attention(layer: int, window: int | None) -> Callable:
        def attend(q, k, v) -> tuple[jax.Array, list[jax.Array]]:
            out, *pools = attend_cached(policy, q, k, v, cache.k[layer], cache.v[layer],
                                        cache.table, entries, window and window + drafted)
            return out, pools
        return attend

    states, pools = block.run(hidden, tokens, rope,
                              [attention(at + i, window) for i, window in enumerate(block.windows)])
    if absent is not None:
        there = jnp.arange(tokens.shape[1]) >= absent[:, None]
        states = jnp.where(there[..., None], _earlier(states, -absent), 0)
    k, v = ((*old[:at], *new, *old[at + len(new):])
            for old, new in zip((cache.k, cache.v), zip(*pools, strict=True), strict=True))
    return states, cache.replace(k=k, v=v)


def propose(policy: Policy, blocks: Sequence[Block], state: DraftState, entries: jax.Array,
            sampler: Sampler, head: Callable[[jax.Array], jax.Array], vocab: jax.Array | None,
            late: bool = False) -> tuple[Proposal, DraftState]:
    """K sampled tokens with the distributions they were drawn from; depth j + 1 reads depth j's
    states and tokens.

    A block of its own has to catch up first: at depth j it has not yet seen the j - 1 tokens
    drafted before.

    Args:
      entries: int32 [N], of the first block's caches. head: states [N, D] to logits float32
        [N, Vd]. vocab: int32 [Vd] or None.
    """
    cache, last, tokens, log_qs = state.cache, len(blocks) - 1, [], []
    states = state.rows[0]  # of the current depth's block, from the last entry on
    for j in range(sampler.k):
        if 0 < j <= last:
            new, cache = extend(policy, blocks, j, cache, states, jnp.stack(tokens, axis=1),
                                entries, late)
            states = jnp.concatenate([state.rows[j], new], axis=1)
        elif j:
            states, cache = extend(policy, blocks, last, cache, states[:, -1:],
                                   tokens[-1][:, None], entries + j - 1, late, drafted=j)
        token, log_q = sampler.draw(head(states[:, -1]), j, vocab)
        tokens.append(token)
        log_qs.append(log_q)
    proposal = Proposal(jnp.stack(tokens, axis=1), jnp.stack(log_qs, axis=1), vocab)
    return proposal, state.replace(cache=cache)


def observe(policy: Policy, blocks: Sequence[Block], state: DraftState, entries: jax.Array,
            hidden: jax.Array, observation: Observation, late: bool = False) -> DraftState:
    """Rewrite the caches of the committed positions from the verifier's hidden [N, K + 1, D]; keep
    the last states."""
    at = jnp.maximum(observation.count - 1, 0)[:, None, None]
    live = (observation.count > 0)[:, None, None]
    cache, rows = state.cache, []
    for index, before in enumerate(state.rows):
        states, cache = extend(policy, blocks, index, cache, hidden, observation.tokens, entries,
                               late)
        last = jnp.where(live, jnp.take_along_axis(states, at, axis=1), before)
        rows.append(constrain(last, policy.layout, "batch", None, None))
        hidden = jnp.concatenate([before, states[:, :-1]], axis=1)
    return DraftState(tuple(rows), cache)


def unroll(policy: Policy, blocks: Sequence[Block], hidden: jax.Array, tokens: jax.Array,
           depths: int, late: bool = False) -> list[jax.Array]:
    """The states [B, S, D] of every depth over whole sequences, each depth as `propose` computes
    it."""
    rope, out = rope_table(policy.config, jnp.arange(tokens.shape[1])[None]), []
    for depth in range(depths):
        if depth < len(blocks):
            block = blocks[depth]
            earlier: list[list] = [[] for _ in block.windows]
            if late and depth:
                tokens = next_tokens(tokens)
        elif late:
            hidden = shift(hidden)
        states, _ = block.run(hidden, tokens, rope,
                              [unrolled_attention(own, window)
                               for own, window in zip(earlier, block.windows, strict=True)])
        hidden = states if late else shift(states)
        for _ in range(min(depth, len(blocks) - 1) if late else 0):
            states = shift(states)
        out.append(states)
    return out
