"""Look-up: what followed the last time the sequence ended like this, in its own prompt and output.
No weights.

https://arxiv.org/abs/2304.04487 and the prompt look-up that serving systems ship; the search runs
on the device.
"""

from __future__ import annotations

import dataclasses

import jax

from jspec.arguments import settle, whole
from jspec.drafts.base import Committed, Draft, Drafter, DraftState, Proposal, Sampler
from jspec.drafts.parts.lookup import look_up
from jspec.model import ModelConfig, Policy


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """max_ngram: the longest suffix that is looked up; shorter ones, down to one token, are tried
    after it."""

    policy: ModelConfig
    max_ngram: int = 3

    def __post_init__(self) -> None:
        settle(self, "ngram draft: ", max_ngram=whole(1, 256))


def init(policy: Policy, key: jax.Array | None = None, *, max_ngram: int = 3) -> Draft:
    """An n-gram draft. The key is not used: there is nothing random in it. Raises InputError if
    max_ngram is no whole number from 1 to 256."""
    return Draft(weights={}, state={}, config=NgramConfig(policy.config, max_ngram), drafter=ngram)


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """The tokens after the longest, then latest, earlier occurrence of the suffix; past the end
    they repeat with its period. Deterministic: judged as q = 1. A row without a match drafts its
    last token again."""
    _, tokens = look_up(committed.tokens, committed.lengths, draft.config.max_ngram, sampler.k)
    return Proposal(tokens), state


ngram = Drafter("ngram", NgramConfig, init, propose)
