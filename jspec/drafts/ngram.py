"""Look-up: what followed the last time the sequence ended like this, in its own prompt and output. No weights.

https://arxiv.org/abs/2304.04487 and the prompt look-up that serving systems ship; the search runs on the device.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jspec.drafts.base import Committed, Draft, Observation, Prefill, Proposal, Sampler
from jspec.errors import InputError
from jspec.model import ModelConfig, Policy

loss = None


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """max_ngram: the longest suffix that is looked up; shorter ones, down to one token, are tried after it."""

    policy: ModelConfig
    max_ngram: int = 3
    name: str = "ngram"


Config = NgramConfig


def init(policy: Policy, key: jax.Array | None = None, *, max_ngram: int = 3) -> Draft:
    """An n-gram draft. The key is not used: there is nothing random in it. Raises InputError if max_ngram < 1."""
    if max_ngram < 1:
        raise InputError(f"ngram draft: max_ngram = {max_ngram} must be at least 1")
    return Draft(weights={}, state={}, config=NgramConfig(policy.config, max_ngram))


def features(config: NgramConfig) -> tuple[int, ...]:
    return ()


def specs(config: NgramConfig) -> dict:
    return {}


def prepare(policy: Policy, draft: Draft) -> Draft:
    return draft


def start(policy: Policy, draft: Draft, prefill: Prefill, cache_size: int) -> dict:
    return {}


def propose(policy: Policy, draft: Draft, state: dict, committed: Committed, sampler: Sampler):
    """The tokens after the longest, then latest, earlier occurrence of the suffix; past the end they repeat with its
    period. Deterministic: judged as q = 1. A row without a match drafts its last token again."""
    tokens, end = committed.tokens, committed.lengths[:, None] - 1
    position = jnp.arange(tokens.shape[1])[None]
    run = jnp.ones(tokens.shape, bool)
    matched = jnp.zeros(tokens.shape, jnp.int32)
    for n in range(draft.config.max_ngram):
        suffix = jnp.take_along_axis(tokens, jnp.maximum(end - n, 0), axis=1)
        run = run & (jnp.roll(tokens, n, axis=1) == suffix) & (position >= n)
        matched = matched + run
    score = jnp.where((position < end) & (matched > 0), matched * tokens.shape[1] + position, -1)
    best = jnp.argmax(score, axis=1, keepdims=True)
    found = jnp.take_along_axis(score, best, axis=1) >= 0
    period = jnp.where(found, end - best, 1)
    ahead = end - period + 1 + jnp.arange(sampler.k)[None] % period
    return Proposal(jnp.take_along_axis(tokens, ahead, axis=1)), state


def observe(policy: Policy, draft: Draft, state: dict, observation: Observation) -> dict:
    return state
