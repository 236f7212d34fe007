"""One cycle of speculative decoding: propose, verify, accept, commit. Pure in its state and its
noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jspec.drafts.base import Committed, Draft, DraftState, Observation, Proposal, Sampler
from jspec.kernels import judge
from jspec.model import Policy, Trunk, logits, verify
from jspec.speculate.state import Rows, State, rows_in_slots
from jspec.speculate.types import Sampling
from pallas_kernels.rejection_sampling import Verdict


def split_features(trunk: Trunk, count: int) -> tuple[Trunk, Trunk]:
    """The trunk's states with its first `count` features, and with the others."""
    states = trunk.replace(routes=None)
    return (states.replace(features=trunk.features[:count]),
            states.replace(features=trunk.features[count:]))


def committed(state: State, rows: Rows) -> Committed:
    """What a drafter is shown. What it does not look at is never gathered."""
    of = state.sequences
    return Committed(jnp.take(of.tokens, state.slots, axis=0, mode="clip"), rows.lengths,
                     state.cache, of.tokens, of.lengths, state.slots, of.group_size)


def propose(policy: Policy, draft: Draft | None, state: State, rows: Rows, noise: Any, top_k: int,
            k: int) -> tuple[Proposal, DraftState | None]:
    """The Proposal, of K tokens a row, and the drafter's state."""
    if draft is None or k == 0:
        return Proposal(jnp.zeros((rows.lengths.shape[0], 0), jnp.int32)), state.draft
    sampler = Sampler(noise, rows.temperature, rows.top_p, top_k, k, policy.layout, rows.min_p)
    return draft.drafter.propose(policy, draft, state.draft, committed(state, rows), sampler)


def _accept(policy: Policy, rows: Rows, hidden: jax.Array, proposal: Proposal, noise: Any,
            sampling: Sampling, stop_tokens: tuple[int, ...]) -> Verdict:
    ban = None
    if sampling.min_new_tokens and stop_tokens:
        generated = (rows.lengths - rows.prompt_lengths)[:, None] + jnp.arange(hidden.shape[1])
        ban = generated < sampling.min_new_tokens
    # made as rows: K + 1 of them a sequence do not fill a tile of a TPU's memory, and would be
    # copied to where they do
    scores = logits(policy, hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], -1)
    return judge(policy, scores, proposal.tokens, proposal.log_q, noise, rows.temperature,
                 rows.top_p, draft_vocab=proposal.vocab, top_k=sampling.top_k, min_p=rows.min_p,
                 ban=ban, banned_tokens=stop_tokens)


def _counted(drafts: jax.Array, live: jax.Array, room: jax.Array,
             stop_tokens: tuple[int, ...]) -> jax.Array:
    """Which of the drafts int32 [N, K] could be emitted, whatever the verdict, bool [N, K]: none
    after a drafted end token, and none beyond what a row has room for, int32 [N]. Nothing else may
    decide: counts that knew what was accepted would be biased."""
    ends = jnp.isin(drafts, jnp.array(stop_tokens, jnp.int32)).astype(jnp.int32)
    ended = jnp.cumsum(ends, axis=1) > ends
    return live[:, None] & ~ended & (jnp.arange(drafts.shape[1]) < room[:, None])


def _commit(state: State, rows: Rows, drafts: jax.Array, verdict: Verdict, routes: jax.Array | None,
            stop_tokens: tuple[int, ...]) -> tuple[State, jax.Array]:
    """Keep the emitted tokens up to the first end token and the limit. drafts: int32 [B, K], that
    were judged. routes: of the pending token and the drafts, see `Trunk`.

    Returns (state, count int32 [B])."""
    width = verdict.tokens.shape[1]
    offsets = jnp.arange(width, dtype=jnp.int32)
    count = verdict.accepted + 1
    is_stop = (jnp.isin(verdict.tokens, jnp.array(stop_tokens, jnp.int32))
               & (offsets < count[:, None]))
    first_stop = jnp.where(is_stop, offsets, width).min(-1)
    generated = rows.lengths - rows.prompt_lengths
    room = rows.limit - generated
    count = jnp.where(rows.live, jnp.minimum(jnp.minimum(count, first_stop + 1), room), 0)
    drafted = _counted(drafts, rows.live, room, stop_tokens)
    accepted = drafted & (offsets[:-1] < verdict.accepted[:, None])
    finished = first_stop < count
    of, at, counts = state.sequences, state.slots, state.counts
    # a free slot's sequence is none: what is written there is dropped

    def by_token(buffer, values, start) -> jax.Array:
        return buffer.at[at[:, None], start[:, None] + offsets].set(values, mode="drop")

    def by_row(buffer, values) -> jax.Array:
        return buffer.at[at].set(values, mode="drop")

    sequences = of.replace(
        tokens=by_token(of.tokens, verdict.tokens, rows.lengths),
        logprobs=by_token(of.logprobs, verdict.logprobs, generated),
        entropy=by_token(of.entropy, verdict.entropy, generated),
        behaviour_logprobs=None if of.behaviour_logprobs is None else by_token(
            of.behaviour_logprobs, verdict.behaviour_logprobs, generated),
        routes=None if routes is None else by_token(
            of.routes, routes.reshape(*routes.shape[:2], -1), generated),
        lengths=by_row(of.lengths, rows.lengths + count),
        finished=by_row(of.finished, finished),
        done=by_row(of.done, finished | (count == room)),
        cycles=of.cycles.at[at].add(1, mode="drop"))
    k = drafts.shape[1]
    counts = counts.replace(drafted=counts.drafted.at[:k].add(drafted.sum(0, dtype=jnp.int32)),
                            accepted=counts.accepted.at[:k].add(accepted.sum(0, dtype=jnp.int32)))
    return state.replace(sequences=sequences, counts=counts), count


def cycle(policy: Policy, draft: Draft | None, state: State, noise: Any, *, sampling: Sampling,
          stop_tokens: tuple[int, ...], k: int, depths: tuple[int, ...] | None = None
          ) -> tuple[State, Proposal, Verdict]:
    """Advance every live row by 1 .. k + 1 tokens, with exactly the policy's distribution; what it
    proposed, and how that was judged.

    Args:
      policy: in a rollout layout. draft: prepared, or None for autoregressive decoding (k = 0).
      state: live rows have blocks for k + 1 positions more (`state.grow`).
      noise: of this cycle, as `types.NOISE[rule](key, ids, lengths, k)` makes it of the rows; it
        names the rule.
      sampling, stop_tokens, k, depths: static but for sampling's leaves, which the sequences hold.
    """
    rows = rows_in_slots(state)
    with jax.named_scope("propose"):
        proposal, draft_state = propose(policy, draft, state, rows, noise, sampling.top_k, k)
    with jax.named_scope("verify"):
        of = state.sequences
        pending = of.tokens.at[state.slots, rows.lengths - 1].get(mode="clip")
        features = () if draft is None else draft.drafter.features(draft.config)
        cache = state.cache if proposal.cache is None else proposal.cache
        computed, cache = verify(policy,
                                 jnp.concatenate([pending[:, None], proposal.tokens], axis=1),
                                 cache, rows.lengths - 1, depths=(*features, *(depths or ())))
        trunk, kept = split_features(computed, len(features))
    with jax.named_scope("accept"):
        verdict = _accept(policy, rows, trunk.hidden, proposal, noise, sampling, stop_tokens)
    with jax.named_scope("commit"):
        new, count = _commit(state.replace(cache=cache), rows, proposal.tokens, verdict,
                             computed.routes, stop_tokens)
        if depths is not None:
            at = rows.lengths[:, None] - 1 + jnp.arange(verdict.tokens.shape[1])
            write = jax.tree.map(lambda all, x: all.at[state.slots[:, None], at]
                                 .set(x, mode="drop"), of.trunk, kept)
            new = new.replace(sequences=new.sequences.replace(trunk=write))
    if draft is not None:
        with jax.named_scope("observe"):
            observation = Observation(trunk, verdict.tokens, rows.lengths, count)
            new = new.replace(draft=draft.drafter.observe(policy, draft, draft_state, observation))
    return new, proposal, verdict
