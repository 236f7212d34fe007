"""A trained draft, and in rows where history is surer what followed there.

Of a row's K tokens all are the trained draft's, sampled, or all are history's, certain: q is then 1
on each (`parts.certain`). Suffix decoding falls back on a trained draft in the same way
(https://arxiv.org/abs/2411.04975).

Why it is exact: which of the two a row takes follows from committed tokens alone (`suffix` says why
those may be looked at). A choice that knew what the trained draft has drawn would not be: what is
kept only where it agrees with something was drawn from another q than the one it is judged by.

The trained draft's state is of committed tokens, whosever proposal they were accepted from:
`observe` makes it from what the verifier computed.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jspec.arguments import instance, one_of, optional, real, settle
from jspec.choices import DRAFTERS, MIXED
from jspec.drafts.base import (
    Committed,
    Draft,
    DraftBatch,
    Drafter,
    DraftState,
    Metrics,
    Observation,
    Prefill,
    Proposal,
    Sampler,
    config_from_fields,
)
from jspec.drafts.parts.certain import with_certain
from jspec.drafts.parts.lookup import vote
from jspec.drafts.parts.making import constructor
from jspec.drafts.suffix import SuffixConfig, matches
from jspec.drafts.suffix import suffix as history
from jspec.errors import InputError
from jspec.model import KeyValues, ModelConfig, Policy


def _trained(name: Any) -> Drafter:
    """One of jspec's own drafters that are trained. Raises InputError for another one."""
    one_of(x for x in DRAFTERS if x != MIXED)("mixed draft: draft", name)
    drafter = getattr(importlib.import_module(f"jspec.drafts.{name}"), name)
    if drafter.loss is None:
        raise InputError(f"mixed draft: draft = {name!r} is not trained; take one that is, such as "
                         "'mtp'")
    return drafter


@dataclasses.dataclass(frozen=True)
class MixedConfig:
    """trained: the trained draft's drafter. draft, suffix: the configs of both. certainty: that of
    `parts.lookup.vote` from which on a row drafts what followed in its history."""

    policy: ModelConfig
    trained: str
    draft: Any
    suffix: SuffixConfig
    certainty: float

    def __post_init__(self) -> None:
        settle(self, "mixed draft: ", certainty=real(0.0, 1.0))
        for part, drafter in (("draft", _trained(self.trained)), ("suffix", history)):
            config = getattr(self, part)
            if isinstance(config, dict):  # as it is read from files
                config = config_from_fields(drafter, config)
            object.__setattr__(self, part, dataclasses.replace(config, policy=self.policy))


def init(policy: Policy, key: jax.Array | None = None, *, draft: str | Draft = "mtp",
         options: Mapping[str, Any] | None = None, suffix: Mapping[str, Any] | None = None,
         certainty: float = 0.8) -> Draft:
    """A trained draft with a history beside it, which is empty.

    Its weights are the trained draft's; its state: `draft`, the trained draft's, and `suffix`,
    where there is any (files keep nothing of what is empty).

    Args:
      key: of the fresh draft.
      draft: the drafter of a fresh one, by name, or a draft that is there (`jspec.load_draft`).
      options: of the fresh draft. suffix: of the history (`jspec.drafts.suffix`).
      certainty: from which on a row drafts what followed in its history, from 0 to 1: its first
        token's share of the votes (`parts.lookup.vote`).

    Raises InputError for a drafter that is not trained, a draft of another policy, and for
    whatever both refuse.
    """
    mapping = optional(instance(Mapping, "options by name, such as {max_match: 8}"))
    options, suffix = (mapping("mixed draft: options", options),
                       mapping("mixed draft: suffix", suffix))
    if not isinstance(draft, Draft):
        draft = constructor(_trained(draft))(policy, key, **options or {})
    elif options:
        raise InputError("mixed draft: options are a fresh draft's, and the given one has its own; "
                         "leave them out")
    draft.check(policy)
    past = constructor(history)(policy, **suffix or {})
    config = MixedConfig(policy.config, draft.name, draft.config, past.config, certainty)
    state = {"draft": draft.state, "suffix": past.state}
    return Draft(weights=draft.weights, state={name: x for name, x in state.items() if x},
                 config=config, drafter=mixed)


def trained_of(draft: Draft) -> Draft:
    """The trained draft of a mixed one."""
    return Draft(draft.weights, draft.state.get("draft", {}), draft.config.draft,
                 _trained(draft.config.trained))


def _history_of(draft: Draft) -> Draft:
    return Draft({}, draft.state.get("suffix", {}), draft.config.suffix, history)


def features(config: MixedConfig) -> tuple[int, ...]:
    return _trained(config.trained).features(config.draft)


def specs(config: MixedConfig) -> Any:
    return _trained(config.trained).specs(config.draft)


def model(config: MixedConfig) -> ModelConfig:
    return _trained(config.trained).model(config.draft)


def prepare(policy: Policy, draft: Draft) -> Draft:
    """Of the trained draft; history is used as it is."""
    own = trained_of(draft)
    ready = own.drafter.prepare(policy, own)
    return draft.replace(weights=ready.weights, state={**draft.state, "draft": ready.state})


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[dict, KeyValues]:
    """What both keep of each row, by their names, and the trained draft's keys and values."""
    own = trained_of(draft)
    rows, key_values = own.drafter.start(policy, own, prefill)
    past, _ = history.start(policy, _history_of(draft), prefill)
    return {"draft": rows, "suffix": past}, key_values


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """The trained draft's proposal, and history's in its place where that is certain enough."""
    own = trained_of(draft)
    proposal, after = own.drafter.propose(policy, own, state.replace(rows=state.rows["draft"]),
                                          committed, sampler)
    tokens, certainty = vote(*matches(_history_of(draft), state.replace(rows=state.rows["suffix"]),
                                      committed, sampler.k))
    proposal = with_certain(proposal, tokens, certainty >= draft.config.certainty,
                            policy.config.vocab_size)
    return proposal, after.replace(rows={**state.rows, "draft": after.rows})


def observe(policy: Policy, draft: Draft, state: DraftState,
            observation: Observation) -> DraftState:
    own = trained_of(draft)
    after = own.drafter.observe(policy, own, state.replace(rows=state.rows["draft"]), observation)
    return after.replace(rows={**state.rows, "draft": after.rows})


def loss(policy: Policy, draft: Draft, batch: DraftBatch,
         kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """The trained draft's."""
    own = trained_of(draft)
    return own.drafter.loss(policy, own, batch, kind)


def remember(draft: Draft, batch: Any, rollout: Any) -> Draft:
    """See `suffix.remember`."""
    if "suffix" not in draft.state:
        return draft
    past = history.remember(_history_of(draft), batch, rollout)
    return draft.replace(state={**draft.state, "suffix": past.state})


def least_squares(policy: Policy, draft: Draft, batches: Iterable[DraftBatch]) -> Draft:
    """The trained draft's, where it has one."""
    own = trained_of(draft)
    if own.drafter.least_squares is None:
        return draft
    return draft.replace(weights=own.drafter.least_squares(policy, own, batches).weights)


mixed = Drafter(MIXED, MixedConfig, init, propose, features, specs, prepare, start, observe, loss,
                remember, least_squares, model)
