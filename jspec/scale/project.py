"""What speculation brings to rollouts and steps: seconds of a cycle (`cycle_cost.py`), cycles of a
rollout whose rows shrink (`lengths.py`), and the rest of the step.

    rollout = prefill + the sum over spans of (tokens / tokens a cycle) x seconds of a cycle
    step    = rollout + rest, or with a policy lag the longer of the two
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jspec.scale.cycle_cost import Cycle, Decoding, cycle
from jspec.scale.lengths import Spans


def tokens_a_cycle(acceptance: float, k: int) -> float:
    """Expected tokens of a cycle that drafts k, each accepted with the same probability if all
    before it are, and the verifier's own: (1 - a^(k+1)) / (1 - a)."""
    return k + 1.0 if acceptance == 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


@dataclasses.dataclass(frozen=True)
class Answers:
    """A step's answers on their shards.

    Attributes:
      spans: of the answers, see `lengths.spans`.
      chain: rows of each loop that is compiled, ever fewer: so many rows a shard cost what they
        cost, dead ones included. (): exactly the live ones, as in an engine that compiles none.
      prompts: tokens of a shard's prompts, which are computed once and cannot be drafted.
    """

    spans: Spans
    chain: tuple[int, ...] = ()
    prompts: float = 0.0

    def rows(self) -> np.ndarray:
        """Rows that a cycle computes on a shard, by span."""
        live = np.ceil(self.spans.live - 1e-9)
        if not self.chain:
            return live
        bounds = np.sort(self.chain)
        return bounds[np.minimum(np.searchsorted(bounds, live), len(bounds) - 1)]


def prefill_seconds(decoding: Decoding, tokens: float) -> float:
    """The floor of computing a shard's prompts: their operations."""
    operations = 2 * decoding.policy.active * tokens / decoding.split.tensor
    return operations / decoding.chip.rate(decoding.policy.rate)


def cycles(decoding: Decoding, answers: Answers, k: int) -> Cycle:
    """A cycle of every span."""
    return cycle(decoding, k, answers.rows(), answers.spans.context)


def decode_seconds(decoding: Decoding, answers: Answers, k: int = 0, tokens: float = 1.0) -> float:
    """Of the slowest group of shards, after its prompts. tokens: a cycle of a row yields on
    average."""
    spent = answers.spans.tokens / tokens * cycles(decoding, answers, k).seconds
    return float(np.bincount(answers.spans.group, spent).max())


def rollout_seconds(decoding: Decoding, answers: Answers, k: int = 0, tokens: float = 1.0) -> float:
    """Of the slowest group of shards."""
    return decode_seconds(decoding, answers, k, tokens) + prefill_seconds(decoding, answers.prompts)


def update_seconds(decoding: Decoding, tokens: float, passes: float) -> float:
    """The floor of a step's update: its operations, on all devices, in bfloat16.

    tokens: of prompts and answers. passes: over the weights, a forward being one and a backward
    two.
    """
    operations = 2 * decoding.policy.active * tokens * passes
    return operations / (decoding.split.devices * decoding.chip.bf16)


def step_seconds(generation: float, rest: float, lag: int = 0) -> float:
    """lag: how many steps the policy that generates may be behind. 0: one after the other; else
    both at the same time, on devices of their own. (More than 1 evens out what differs from step to
    step; here nothing does.)"""
    return max(generation, rest) if lag else generation + rest


def rest_of_share(generation: float, share: float) -> float:
    """Seconds of the rest if generation without a draft takes `share` of both together."""
    return generation * (1 - share) / share


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way of speculating against none: rollout, step: how many times faster. acceptance: of a
    draft at each position; None: tokens a cycle were given."""

    k: int
    tokens: float
    acceptance: float | None
    rollout: float
    step: float


@dataclasses.dataclass(frozen=True)
class Projection:
    """A step's seconds.

    Attributes:
      prompts, plain: of the prompts, and of decoding without a draft.
      drafting: by k, of decoding if a cycle yielded no more than one token.
      rest, lag: see `step_seconds`.
    """

    prompts: float
    plain: float
    drafting: dict[int, float]
    rest: float
    lag: int = 0

    @property
    def generation(self) -> float:
        return self.prompts + self.plain

    @property
    def share(self) -> float:
        """Of generation in what a step without a draft computes."""
        return self.generation / (self.generation + self.rest)

    @property
    def bound(self) -> float:
        """How many times faster a step would be whose rollout took no time."""
        steps = [step_seconds(generation, self.rest, self.lag)
                 for generation in (self.generation, 0.0)]
        return steps[0] / steps[1] if steps[1] else np.inf

    def cost(self, k: int) -> float:
        """Of a cycle, in plain ones: from so many tokens a cycle on speculation pays."""
        return self.drafting[k] / self.plain

    def cell(self, k: int, tokens: float, acceptance: float | None = None) -> Cell:
        drafting = self.prompts + self.drafting[k] / tokens
        steps = [step_seconds(generation, self.rest, self.lag)
                 for generation in (self.generation, drafting)]
        return Cell(k, tokens, acceptance, self.generation / drafting, steps[0] / steps[1])


def project(decoding: Decoding, answers: Answers, ks: Sequence[int], rest: float = 0.0,
            lag: int = 0) -> Projection:
    return Projection(prefill_seconds(decoding, answers.prompts), decode_seconds(decoding, answers),
                      {k: decode_seconds(decoding, answers, k) for k in ks}, rest, lag)


def by_acceptance(projection: Projection, acceptances: Sequence[float]) -> list[list[Cell | None]]:
    """Cells, a row for every acceptance, a column for every k."""
    return [[projection.cell(k, tokens_a_cycle(a, k), a) for k in projection.drafting]
            for a in acceptances]


def by_tokens(projection: Projection, tokens: Sequence[float]) -> list[list[Cell | None]]:
    """The same for tokens a cycle that are given. None: more than k drafts and one."""
    return [[projection.cell(k, t) if t <= k + 1 else None for k in projection.drafting]
            for t in tokens]


def pays_from(projection: Projection, k: int) -> float | None:
    """The acceptance from which on drafting k tokens makes rollouts faster. None: at none."""
    wanted = projection.cost(k)
    if wanted > k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_a_cycle(middle, k) < wanted else (low, middle)
    return high
