"""A drafter of your own, in one file: what followed a token when the row had it last.

    jspec rollout smollm2-135m-instruct --draft examples/drafter.py:bigram --prompt "Count to 20."
    jspec bench drafts smollm2-135m-instruct --drafts none,ngram,examples/drafter.py:bigram
    jspec train configs/tiny.yaml draft.name=examples/drafter.py:bigram

A drafter is a value, `jspec.drafts.Drafter`: a name, a config, and functions, of which only `init`
and `propose` must be given (jspec/drafts/base.py says what each takes and returns). Whatever they
do, the answers are the policy's: a drafter decides how fast they come. From Python:

    draft = bigram.init(params)
    out = jspec.rollout(params, draft, batch)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jspec.drafts.base import (
    Committed,
    Draft,
    Drafter,
    DraftState,
    Observation,
    Prefill,
    Proposal,
    Sampler,
)
from jspec.model import ModelConfig, Policy


@dataclasses.dataclass(frozen=True)
class Config:
    """Static: each value is a program of its own. Every drafter's config has `policy`.

    answer: look at the answer so far too, not at the prompt alone.
    """

    policy: ModelConfig
    answer: bool = True


def init(policy: Policy, key: jax.Array | None = None, *, answer: bool = True) -> Draft:
    """A draft. Options are set by `draft.options={answer: false}`. Weights would be drawn here."""
    return Draft(weights={}, state={}, config=Config(policy.config, answer), drafter=bigram)


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[dict, tuple]:
    """Of P prompts [P, L]: `seen` int32 [P, V], where each token of the vocabulary was last
    followed by another (-1: nowhere), and `last` int32 [P], the last token. No keys and values are
    kept."""
    prompts, length = prefill.tokens.shape
    at = jnp.broadcast_to(jnp.arange(length), (prompts, length))
    nowhere = jnp.full((prompts, policy.config.vocab_size), -1, jnp.int32)
    last = jnp.take_along_axis(prefill.tokens, prefill.lengths[:, None] - 1, axis=1)[:, 0]
    followed = at < prefill.lengths[:, None] - 1
    return {"seen": _seen(nowhere, prefill.tokens, at, followed), "last": last}, ()


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """sampler.k tokens for each of B rows, int32 [B, K]. They are not drawn, so there are no
    distributions to give; a drafter that samples does it with `sampler.draw`."""
    rows, token, drafted = jnp.arange(len(committed.lengths)), state.rows["last"], []
    for _ in range(sampler.k):
        at = state.rows["seen"][rows, token]
        token = jnp.where(at < 0, token, committed.tokens[rows, at + 1])
        drafted.append(token)
    return Proposal(jnp.stack(drafted, axis=1)), state


def observe(policy: Policy, draft: Draft, state: DraftState,
            observation: Observation) -> DraftState:
    """Folds in what a cycle committed: the first `count` [B] of its tokens [B, K + 1]."""
    tokens, count = observation.tokens, observation.count
    seen, last = state.rows["seen"], state.rows["last"]
    if draft.config.answer:
        followed = jnp.concatenate([last[:, None], tokens[:, :-1]], axis=1)
        step = jnp.arange(tokens.shape[1])
        at = observation.lengths[:, None] - 1 + step
        seen = _seen(seen, followed, at, step < count[:, None])
    newest = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    return state.replace(rows={"seen": seen, "last": jnp.where(count > 0, newest, last)})


def _seen(seen: jax.Array, tokens: jax.Array, at: jax.Array, valid: jax.Array) -> jax.Array:
    """`seen` [B, V] with the positions `at` [B, T] of tokens [B, T], where `valid` [B, T]."""
    rows = jnp.arange(len(seen))[:, None]
    return seen.at[rows, jnp.where(valid, tokens, seen.shape[1])].max(at, mode="drop")


bigram = Drafter("bigram", Config, init, propose, start=start, observe=observe)
