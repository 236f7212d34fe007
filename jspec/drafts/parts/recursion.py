"""Blocks that draft recursively: one reads the states of the depth before, and keeps keys and
values of its own.

A drafter hands over its blocks as functions `block(hidden, tokens, rope, attend) -> (states,
cache)`: entry i reads hidden [B, T, D] of the position before tokens [B, T], and its state predicts
the token after. The first depths have a block each; the last block serves all the depths after it
too (https://arxiv.org/abs/2503.01840). `entries` is how many entries a row's caches hold. What a
depth drafted is overwritten once the verifier's states are known.

`policy` is read for what the blocks are computed in and where: its config must have the blocks'
heads and rope.

`window` is for one block that serves every depth: of the entries made from the trunk's states its
attention sees the `window` last (None: all of them), and at every depth those of the depths before,
as the block's trainer has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jspec.drafts.base import Draft, DraftState, Observation, Proposal, Sampler
from jspec.drafts.parts.unroll import shift, unrolled_attention
from jspec.kernels import attend as attend_cached
from jspec.model import Cache, KeyValues, Policy
from jspec.model.attention import causal_attention
from jspec.model.layers import rope_table
from jspec.sharding import constrain, constrain_tree

Block = Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]
"""A decoder block, as above; its cache is what `attend` returned."""
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
          entries: jax.Array, window: int | None = None) -> tuple[Rows, KeyValues]:
    """Of every block, its state [P, 1, D] at the last of entries int32 [P], zeros where there are
    none, and its keys and values over hidden [P, L, D] and tokens [P, L]."""
    rope = rope_table(policy.config, jnp.arange(tokens.shape[1])[None])

    def attend(q, k, v) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return causal_attention(q, k, v, window), (k, v)

    rows, kept = [], []
    for block in blocks:
        states, pair = block(hidden, tokens, rope, attend)
        at = jnp.maximum(entries - 1, 0)[:, None, None]
        rows.append(jnp.where(entries[:, None, None] > 0, jnp.take_along_axis(states, at, axis=1),
                              0))
        kept.append(pair)
        hidden = shift(states)
    return tuple(rows), tuple(kept)


def _extend(policy: Policy, block: Block, index: int, cache: Cache, hidden: jax.Array,
            tokens: jax.Array,
            entries: jax.Array, window: int | None = None) -> tuple[jax.Array, Cache]:
    """Run tokens int32 [N, T] as entries entries .. entries + T - 1 of a block, writing its keys
    and values."""
    rope = rope_table(policy.config, entries[:, None] + jnp.arange(tokens.shape[1])[None])

    def attend(q, k, v) -> tuple[jax.Array, list[jax.Array]]:
        out, *pools = attend_cached(policy, q, k, v, cache.k[index], cache.v[index], cache.table,
                                    entries, window)
        return out, pools

    def replaced(pools: tuple[jax.Array, ...], pool: jax.Array) -> tuple[jax.Array, ...]:
        return (*pools[:index], pool, *pools[index + 1:])

    states, (k, v) = block(hidden, tokens, rope, attend)
    return states, cache.replace(k=replaced(cache.k, k), v=replaced(cache.v, v))


def propose(policy: Policy, blocks: Sequence[Block], state: DraftState, entries: jax.Array,
            sampler: Sampler, head: Callable[[jax.Array], jax.Array], vocab: jax.Array | None,
            window: int | None = None) -> tuple[Proposal, DraftState]:
    """K sampled tokens with the distributions they were drawn from; depth j + 1 reads depth j's
    states and tokens.

    A block of its own has to catch up first: at depth j it has not yet seen the j - 1 tokens
    drafted before.

    Args:
      entries: int32 [N], of every cache. head: states [N, D] to logits float32 [N, Vd]. vocab:
        int32 [Vd] or None.
    """
    cache, last, tokens, log_qs = state.cache, len(blocks) - 1, [], []
    states = state.rows[0]  # of the current depth's block, from the last entry on
    for j in range(sampler.k):
        if 0 < j <= last:
            new, cache = _extend(policy, blocks[j], j, cache, states, jnp.stack(tokens, axis=1),
                                 entries)
            states = jnp.concatenate([state.rows[j], new], axis=1)
        elif j:
            states, cache = _extend(policy, blocks[last], last, cache, states[:, -1:],
                                    tokens[-1][:, None],
                                    entries + j - 1, None if window is None else window + j)
        token, log_q = sampler.draw(head(states[:, -1]), j, vocab)
        tokens.append(token)
        log_qs.append(log_q)
    proposal = Proposal(jnp.stack(tokens, axis=1), jnp.stack(log_qs, axis=1), vocab)
    return proposal, state.replace(cache=cache)


def observe(policy: Policy, blocks: Sequence[Block], state: DraftState, entries: jax.Array,
            hidden: jax.Array, observation: Observation, window: int | None = None) -> DraftState:
    """Rewrite the caches of the committed positions from the verifier's hidden [N, K + 1, D]; keep
    the last states."""
    at = jnp.maximum(observation.count - 1, 0)[:, None, None]
    live = (observation.count > 0)[:, None, None]
    cache, rows = state.cache, []
    for index, (block, before) in enumerate(zip(blocks, state.rows, strict=True)):
        states, cache = _extend(policy, block, index, cache, hidden, observation.tokens, entries,
                                window)
        last = jnp.where(live, jnp.take_along_axis(states, at, axis=1), before)
        rows.append(constrain(last, policy.layout, "batch", None, None))
        hidden = jnp.concatenate([before, states[:, :-1]], axis=1)
    return DraftState(tuple(rows), cache)


def unroll(policy: Policy, blocks: Sequence[Block], hidden: jax.Array, tokens: jax.Array,
           depths: int, window: int | None = None) -> list[jax.Array]:
    """The states [B, S, D] of every depth over whole sequences, each depth as `propose` computes
    it."""
    rope, out = rope_table(policy.config, jnp.arange(tokens.shape[1])[None]), []
    for depth in range(depths):
        if depth < len(blocks):
            block, earlier = blocks[depth], []
        states, _ = block(hidden, tokens, rope, unrolled_attention(earlier, window))
        out.append(states)
        hidden = shift(states)
    return out
