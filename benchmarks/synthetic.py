"""Acceptance given by hand, to ask what a draft of that quality would be worth. Of the benchmark
alone.

A rollout under this rule is not lossless and its text means nothing: the rule's uniforms are
replaced by 0 (accept) or infinity (refuse), drawn with the given probability for each position of
the block. All the arithmetic of the rejection rule still runs, and so does the drafter, so times
are the real ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jspec.drafts.base import Draft, Drafter, Proposal
from jspec.model import ModelConfig, Policy
from jspec.speculate.types import NOISE
from pallas_kernels.noise import rejection_noise


def add_rule(acceptance: Sequence[float]) -> str:
    """A rule that accepts the draft at position j, given all before it, with probability
    acceptance[j].

    Positions beyond the list repeat its last. Returns the rule's name for `Speculation(rule=...)`.
    """
    name = "synthetic:" + ",".join(map(str, acceptance))

    def noise(key, sequence_ids, committed, k):
        made = rejection_noise(key, sequence_ids, committed, k)
        wanted = jnp.array([acceptance[min(j, len(acceptance) - 1)] for j in range(k)], jnp.float32)
        return made.replace(accept=jnp.where(made.accept < wanted, 0.0, jnp.inf))

    NOISE[name] = noise
    return name


@dataclass(frozen=True)
class FreeConfig:
    policy: ModelConfig


def init(policy: Policy, key=None) -> Draft:
    """Of a drafter that costs nothing: it proposes token 1. What a cycle takes with it is the
    verification alone."""
    return Draft(weights={}, state={}, config=FreeConfig(policy.config), drafter=free)


def propose(policy, draft, state, committed, sampler):
    return Proposal(jnp.ones((committed.lengths.shape[0], sampler.k), jnp.int32)), state


free = Drafter("free", FreeConfig, init, propose)


def expected_length(acceptance: Sequence[float], k: int) -> float:
    """Tokens a cycle, 1 + a0 + a0 a1 + ..., which the measured acceptance length must come near."""
    total, alive = 1.0, 1.0
    for j in range(k):
        alive *= acceptance[min(j, len(acceptance) - 1)]
        total += alive
    return total

