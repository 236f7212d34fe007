"""The functions of a drafter that has no weights and folds nothing of the verifier's into its state."""

from __future__ import annotations

from typing import Any

from jspec.drafts.base import Draft, DraftState, Observation, Prefill
from jspec.model import KeyValues, Policy


def features(config: Any) -> tuple[int, ...]:
    return ()


def specs(config: Any) -> dict:
    return {}


def prepare(policy: Policy, draft: Draft) -> Draft:
    return draft


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[dict, KeyValues]:
    return {}, ()


def observe(policy: Policy, draft: Draft, state: DraftState, observation: Observation) -> DraftState:
    return state
