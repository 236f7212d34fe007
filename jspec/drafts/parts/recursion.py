"""Blocks that draft recursively: one reads the states of the depth before, and keeps keys and values of its own.

A drafter hands over its blocks as functions `run(hidden, tokens, rope, attend) -> (states, cache)`: entry i reads
hidden [B, T, D] of the position before tokens [B, T], and its state predicts the token after. The first depths have a
block each; the last block serves all the depths after it too (https://arxiv.org/abs/2503.01840). `entries` is how many
entries a row's caches hold. What a depth drafted is overwritten once the verifier's states are known.

`policy` is read for what the blocks are computed in and where: its config must have the blocks' heads and rope.

`window` is for one block that serves every depth: of the entries made from the trunk's states its attention sees the
`window` last (None: all of them), and at every depth those of the depths before, as the block's trainer has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jspec.drafts.base import Observation, Proposal, Sampler
from jspec.drafts.parts.unroll import shift, unrolled_attention
from jspec.kernels import attend as attend_cached
from jspec.model import Policy
from jspec.model.attention import causal_attention, to_cache
from jspec.model.layers import rope_table
from jspec.sharding import constrain

Run = Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]
State = tuple[dict[str, jax.Array], ...]


def next_tokens(tokens: jax.Array) -> jax.Array:
    """Tokens [B, S] by entry, where the first token has none: moved one position earlier. Nothing reads the last."""
    return jnp.pad(tokens, ((0, 0), (0, 1)))[:, 1:]


def start(policy: Policy, runs: Sequence[Run], hidden: jax.Array, tokens: jax.Array, entries: jax.Array,
          cache_size: int, window: int | None = None) -> State:
    """Of every block, its cache over hidden [P, L, D] and tokens [P, L], and its state [P, 1, D] at the last of
    entries int32 [P]: zeros where there are none."""
    rope = rope_table(policy.config, jnp.arange(tokens.shape[1])[None])

    def attend(q, k, v):
        return causal_attention(q, k, v, window), (to_cache(k, cache_size), to_cache(v, cache_size))

    out = []
    for run in runs:
        states, (k, v) = run(hidden, tokens, rope, attend)
        at = jnp.maximum(entries - 1, 0)[:, None, None]
        last = jnp.where(entries[:, None, None] > 0, jnp.take_along_axis(states, at, axis=1), 0)
        out.append({"k": k, "v": v, "hidden": last})
        hidden = shift(states)
    return tuple(out)


def _extend(policy: Policy, run: Run, state: dict, hidden: jax.Array, tokens: jax.Array, entries: jax.Array,
            window: int | None = None):
    """Run tokens [N, T] as entries entries .. entries + T - 1 of a block, writing its cache."""
    rope = rope_table(policy.config, entries[:, None] + jnp.arange(tokens.shape[1])[None])

    def attend(q, k, v):
        out, new_k, new_v = attend_cached(policy, q, k, v, state["k"], state["v"], entries, window)
        return out, (new_k, new_v)

    states, (k, v) = run(hidden, tokens, rope, attend)
    return states, {**state, "k": k, "v": v}


def propose(policy: Policy, runs: Sequence[Run], state: State, entries: jax.Array, sampler: Sampler,
            head: Callable[[jax.Array], jax.Array], vocab: jax.Array | None,
            window: int | None = None) -> tuple[Proposal, State]:
    """K sampled tokens with the distributions they were drawn from; depth j + 1 reads depth j's states and tokens.

    A block of its own has to catch up first: at depth j it has not yet seen the j - 1 tokens drafted before.

    Args:
      entries: int32 [N], of every cache. head: states [N, D] to logits float32 [N, Vd]. vocab: int32 [Vd] or None.
    """
    state, last, tokens, log_qs = list(state), len(runs) - 1, [], []
    states = state[0]["hidden"]  # of the current depth's block, from the last entry on
    for j in range(sampler.k):
        if 0 < j <= last:
            new, state[j] = _extend(policy, runs[j], state[j], states, jnp.stack(tokens, axis=1), entries)
            states = jnp.concatenate([state[j]["hidden"], new], axis=1)
        elif j:
            states, state[last] = _extend(policy, runs[last], state[last], states[:, -1:], tokens[-1][:, None],
                                          entries + j - 1, None if window is None else window + j)
        token, log_q = sampler.draw(head(states[:, -1]), j, vocab)
        tokens.append(token)
        log_qs.append(log_q)
    return Proposal(jnp.stack(tokens, axis=1), jnp.stack(log_qs, axis=1), vocab), tuple(state)


def observe(policy: Policy, runs: Sequence[Run], state: State, entries: jax.Array, hidden: jax.Array,
            observation: Observation, window: int | None = None) -> State:
    """Rewrite the caches of the committed positions from the verifier's hidden [N, K + 1, D]; keep the last states."""
    at = jnp.maximum(observation.count - 1, 0)[:, None, None]
    live = (observation.count > 0)[:, None, None]
    out = []
    for run, before in zip(runs, state, strict=True):
        states, new = _extend(policy, run, before, hidden, observation.tokens, entries, window)
        last = jnp.where(live, jnp.take_along_axis(states, at, axis=1), before["hidden"])
        out.append({**new, "hidden": constrain(last, policy.layout, "batch", None, None)})
        hidden = jnp.concatenate([before["hidden"], states[:, :-1]], axis=1)
    return tuple(out)


def unroll(policy: Policy, runs: Sequence[Run], hidden: jax.Array, tokens: jax.Array, depths: int,
           window: int | None = None) -> list[jax.Array]:
    """The states [B, S, D] of every depth over whole sequences, each depth as `propose` computes it."""
    rope, out = rope_table(policy.config, jnp.arange(tokens.shape[1])[None]), []
    for depth in range(depths):
        if depth < len(runs):
            run, earlier = runs[depth], []
        states, _ = run(hidden, tokens, rope, unrolled_attention(earlier, window))
        out.append(states)
        hidden = shift(states)
    return out
