"""One cycle of speculative decoding: propose, verify, accept, commit. Pure in its state and its noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.drafts.base import Committed, Draft, Observation, Proposal, Sampler
from jspec.kernels import judge
from jspec.model import Cache, Policy, Trunk, logits, verify
from jspec.speculate.types import RULES, Sampling  # noqa: F401, RULES are a cycle's too
from pallas_kernels.rejection_sampling import Verdict


@struct.dataclass
class Slots:
    """The loop's state: one row a slot, and each slot knows which sequence it holds.

    The last committed token of a row is pending: its keys and values are not in the cache yet.

    Attributes:
      sequence_ids, prompt_lengths, lengths: int32 [N]; lengths counts committed tokens, the prompt included.
      tokens: int32 [N, S], prompt and output; garbage from `lengths` on.
      logprobs, entropy: float32 [N, T + K], by generated token; garbage beyond what is committed.
      done: bool [N], stopped or at the cap. stopped: bool [N], an end token was emitted.
      temperature: float32 [N]; top_p: float32 [N] or None.
      cache: of the policy, S positions a row. draft_state: the drafter's, rows leading.
      trunk: `Trunk` over [N, S] of the states to be returned, or None; garbage from `lengths` - 1 on.
      cycles: int32 [N]; drafted, accepted: int32 [K], see `RolloutStats`.
      group_size: static; each group_size adjacent slots, from slot 0 on, hold sequences of one prompt.
    """

    sequence_ids: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    entropy: jax.Array
    done: jax.Array
    stopped: jax.Array
    temperature: jax.Array
    top_p: jax.Array | None
    cache: Cache
    draft_state: Any
    trunk: Trunk | None
    cycles: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    group_size: int = struct.field(pytree_node=False, default=1)


def split_features(trunk: Trunk, count: int) -> tuple[Trunk, Trunk]:
    """The trunk with its first `count` features, and with the others."""
    return trunk.replace(features=trunk.features[:count]), trunk.replace(features=trunk.features[count:])


def _write_rows(buffer: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
    """Write values [N, W, ...] into buffer [N, S, ...] at each row's start [N]."""
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(buffer, values, start)


def _propose(policy: Policy, draft: Draft | None, slots: Slots, noise: Any, top_k: int, k: int):
    """The Proposal, of K tokens a row, and the drafter's state."""
    if draft is None or k == 0:
        return Proposal(jnp.zeros((slots.lengths.shape[0], 0), jnp.int32)), slots.draft_state
    sampler = Sampler(noise, slots.temperature, slots.top_p, top_k, k, policy.layout)
    committed = Committed(slots.tokens, slots.lengths, slots.cache, slots.group_size)
    return draft.module.propose(policy, draft, slots.draft_state, committed, sampler)


def _accept(policy: Policy, slots: Slots, hidden: jax.Array, proposal: Proposal, noise: Any,
            sampling: Sampling, stop_tokens: tuple[int, ...]) -> Verdict:
    ban = None
    if sampling.min_new_tokens and stop_tokens:
        generated = (slots.lengths - slots.prompt_lengths)[:, None] + jnp.arange(hidden.shape[1])
        ban = generated < sampling.min_new_tokens
    # made as rows: K + 1 of them a sequence do not fill a tile of a TPU's memory, and would be copied to where they do
    scores = logits(policy, hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], -1)
    return judge(policy, scores, proposal.tokens, proposal.log_q, noise, slots.temperature, slots.top_p,
                 draft_vocab=proposal.vocab, top_k=sampling.top_k, ban=ban, banned_tokens=stop_tokens)


def _counted(drafts: jax.Array, live: jax.Array, room: jax.Array, stop_tokens: tuple[int, ...]) -> jax.Array:
    """Which of the drafts int32 [N, K] could be emitted, whatever the verdict, bool [N, K]: none after a drafted end
    token, and none beyond what a row has room for, int32 [N]. Nothing else may decide: counts that knew what was
    accepted would be biased."""
    ends = jnp.isin(drafts, jnp.array(stop_tokens, jnp.int32))
    ended = jnp.cumsum(ends, axis=1) > ends
    return live[:, None] & ~ended & (jnp.arange(drafts.shape[1]) < room[:, None])


def _commit(slots: Slots, drafts: jax.Array, verdict: Verdict, max_new_tokens: int,
            stop_tokens: tuple[int, ...]) -> tuple[Slots, jax.Array]:
    """Keep the emitted tokens up to the first end token and the cap. drafts: int32 [N, K], that were judged.

    Returns (slots, count int32 [N])."""
    width = verdict.tokens.shape[1]
    offsets = jnp.arange(width, dtype=jnp.int32)
    count = verdict.accepted + 1
    is_stop = jnp.isin(verdict.tokens, jnp.array(stop_tokens, jnp.int32)) & (offsets < count[:, None])
    first_stop = jnp.where(is_stop, offsets, width).min(-1)
    room = slots.prompt_lengths + max_new_tokens - slots.lengths
    count = jnp.where(slots.done, 0, jnp.minimum(jnp.minimum(count, first_stop + 1), room))
    generated = slots.lengths - slots.prompt_lengths
    live = ~slots.done
    drafted = _counted(drafts, live, room, stop_tokens)
    accepted = drafted & (offsets[:-1] < verdict.accepted[:, None])
    stopped = slots.stopped | (live & (first_stop < count))
    return slots.replace(
        tokens=_write_rows(slots.tokens, verdict.tokens, slots.lengths),
        logprobs=_write_rows(slots.logprobs, verdict.logprobs, generated),
        entropy=_write_rows(slots.entropy, verdict.entropy, generated),
        lengths=slots.lengths + count,
        stopped=stopped,
        done=slots.done | stopped | (count == room),
        cycles=slots.cycles + live,
        drafted=slots.drafted + drafted.sum(0, dtype=jnp.int32),
        accepted=slots.accepted + accepted.sum(0, dtype=jnp.int32),
    ), count


def cycle(policy: Policy, draft: Draft | None, slots: Slots, noise: Any, *, sampling: Sampling,
          stop_tokens: tuple[int, ...], k: int, states: tuple[int, ...] | None = None) -> Slots:
    """Advance every live row by 1 .. k + 1 tokens, with exactly the policy's distribution.

    Args:
      policy: in a rollout layout. draft: prepared, or None for autoregressive decoding (k = 0).
      noise: of this cycle, as `RULES[rule](key, sequence_ids, lengths, k)` makes it; it names the rule.
      sampling, stop_tokens, k, states: static but for sampling's leaves, which the slots hold by row.
    """
    with jax.named_scope("propose"):
        proposal, draft_state = _propose(policy, draft, slots, noise, sampling.top_k, k)
    with jax.named_scope("verify"):
        pending = jnp.take_along_axis(slots.tokens, slots.lengths[:, None] - 1, axis=1)
        features = () if draft is None else draft.module.features(draft.config)
        cache = slots.cache if proposal.cache is None else proposal.cache
        computed, cache = verify(policy, jnp.concatenate([pending, proposal.tokens], axis=1), cache,
                                 slots.lengths - 1, features=(*features, *(states or ())))
        trunk, kept = split_features(computed, len(features))
    with jax.named_scope("accept"):
        verdict = _accept(policy, slots, trunk.hidden, proposal, noise, sampling, stop_tokens)
    with jax.named_scope("commit"):
        new, count = _commit(slots.replace(cache=cache), proposal.tokens, verdict, sampling.max_new_tokens,
                             stop_tokens)
        if states is not None:
            new = new.replace(trunk=jax.tree.map(lambda all, x: _write_rows(all, x, slots.lengths - 1), slots.trunk,
                                                 kept))
    if draft is None:
        return new
    with jax.named_scope("observe"):
        observation = Observation(trunk, verdict.tokens, slots.lengths, count)
        return new.replace(draft_state=draft.module.observe(policy, draft, draft_state, observation))
