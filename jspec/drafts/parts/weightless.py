"""The functions of a drafter that has no weights and folds nothing of the verifier's into its state."""

from __future__ import annotations

from typing import Any

from jspec.drafts.base import Draft, Observation
from jspec.model import Policy


def features(config: Any) -> tuple[int, ...]:
    return ()


def specs(config: Any) -> dict:
    return {}


def prepare(policy: Policy, draft: Draft) -> Draft:
    return draft


def observe(policy: Policy, draft: Draft, state: dict, observation: Observation) -> dict:
    return state
