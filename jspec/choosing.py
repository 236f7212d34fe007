"""`speculation.k=auto`: before each step of a run the schedule that promises the most tokens a
second, and what it rests on, as a value that goes from step to step and into checkpoints.
`choose_k` is the same for callers of the API.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jspec.arguments import instance
from jspec.cycle_costs import Point, Subject, accepted, kept, measured, needed, prompts_of
from jspec.drafts import Draft
from jspec.errors import InputError
from jspec.model import Policy
from jspec.speculate.arguments import check
from jspec.speculate.results import RolloutStats
from jspec.speculate.schedule import Choice, Costs, choose_schedule, rates, reason
from jspec.speculate.types import Batching, PromptBatch, Sampling, Schedule, Speculation

log = logging.getLogger(__name__)

LOOK_AGAIN = 16
"""Steps without drafts after which it is looked again at what would be accepted; each time in vain
doubles them."""
SOME = 20
"""Drafts at a position from which on their acceptance is believed."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run drafts, and what that rests on.

    Attributes:
      k: a number or schedule; None: nothing has been chosen yet.
      acceptance: by draft position, how often the drafts up to it were accepted of late.
      lengths: of the last rollout's sequences, in their order; (): there was none.
      costs: as measured; None: not yet.
      look, wait: the step before which it is looked again while nothing is drafted, and the steps
        after that.
    """

    k: int | Schedule | None = None
    acceptance: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    costs: Costs | None = None
    look: int = 0
    wait: int = LOOK_AGAIN

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Plan:
        """From what `dataclasses.asdict` and JSON left of it."""
        k, costs = fields["k"], fields["costs"]
        return cls(**fields | {"k": tuple(map(tuple, k)) if isinstance(k, list) else k,
                               "acceptance": tuple(fields["acceptance"]),
                               "lengths": tuple(fields["lengths"]),
                               "costs": costs and Costs.from_json(costs)})

    def after(self, stats: RolloutStats, lengths: np.ndarray) -> Plan:
        """With what rollouts, on the host, have shown. lengths: int [...] of all sequences of one,
        in their order."""
        drafted, taken = np.asarray(stats.drafted), np.asarray(stats.accepted)
        known = int((np.cumsum(drafted < SOME) == 0).sum())
        now = taken[:known] / np.maximum(drafted[:known], 1)
        before = rates(self.acceptance, max(known, len(self.acceptance)))
        before[:known] = (before[:known] + now) / 2
        return dataclasses.replace(self,
                                   acceptance=tuple(before.tolist()) if known else self.acceptance,
                                   lengths=tuple(lengths.reshape(-1).tolist()))


@dataclasses.dataclass(frozen=True)
class Chooser:
    """How a run's rollouts are made, of `steps` steps; `say` prints a line."""

    sampling: Sampling
    speculation: Speculation
    batching: Batching
    steps: int
    say: Callable[[str], None]

    def before(self, plan: Plan, step: int, params: Policy, draft: Draft,
               batch: PromptBatch) -> Plan:
        """The plan for step `step`, from 0 on, whose policy (in its rollout layout), draft and
        prompts these are."""
        subject = Subject.of(params, draft, batch, self.sampling, self.speculation, self.batching)
        if (plan.costs is not None and (plan.costs.rows, plan.costs.shards)
            != (subject.rows, subject.shards)):
            # of a run that goes on with other slots or on another mesh
            plan = Plan(lengths=plan.lengths)
        looks = plan.costs is None or (plan.k == 0 and step >= plan.look)
        if looks:
            prompts = prompts_of(subject)
            acceptance = accepted(subject, prompts)
            costs = plan.costs or kept(subject) or measured(subject, prompts, needed(subject))
            plan = dataclasses.replace(plan, acceptance=acceptance, costs=costs)
        costs, choice = settled(subject, plan, self.steps - step)
        if changed := choice.k != plan.k:
            self.say(reason(choice, costs, plan.acceptance))
        wait = LOOK_AGAIN if changed else plan.wait * (2 if looks else 1)
        return dataclasses.replace(plan, k=choice.k, costs=costs, wait=wait,
                                   look=step + wait if changed or looks else plan.look)


def settled(subject: Subject, plan: Plan, steps: int) -> tuple[Costs, Choice]:
    """The choice, and the costs with all that it rests on measured."""
    costs = plan.costs
    lengths = plan.lengths or spread(len(subject.batch.sequence_ids), subject.longest)
    while True:
        choice = choose_schedule(costs, plan.acceptance, lengths, current=plan.k, steps=steps)
        unknown = missing(choice.k, costs)
        if not unknown:
            return costs, choice
        costs = measured(subject, prompts_of(subject), unknown, costs)


def missing(k: int | Schedule, costs: Costs) -> list[Point]:
    """What of a schedule was not measured: of the loops in the middle, what lies around them."""
    if not k or isinstance(k, int):
        return []
    first, last = costs.rows[0], costs.rows[-1]
    wanted = {(at, drafted) for rows, drafted in k
              for at in ({rows} if rows in (first, last) else {first, last})}
    return sorted(wanted - {(rows, drafted) for rows, drafted, _ in costs.drafting})


def spread(sequences: int, longest: int) -> tuple[int, ...]:
    """Lengths to count with before any are known: from short to the cap, in any order."""
    even = np.ceil((np.arange(sequences) + 1) * longest / sequences).astype(int)
    return tuple(np.random.default_rng(0).permutation(even).tolist())


def choose_k(params: Policy, draft: Draft, batch: PromptBatch, *, sampling: Sampling | None = None,
             speculation: Speculation | None = None, batching: Batching | None = None,
             lengths: Sequence[int] | None = None) -> int | Schedule:
    """What `jspec.Speculation(k=...)` should be for rollouts like this one, on these devices: what
    a cycle costs is measured for a few (rows, k), once for a device and shapes (`JSPEC_CACHE` keeps
    it), and what is accepted on these prompts. Not for use inside a `jax.jit`.

    Args:
      params, draft, batch, sampling, batching: as `jspec.rollout` is given them; params in a
        rollout layout (`jspec.reshard`), else every measurement pays for that too.
      speculation: its rule, kernels and states; its k is what is asked.
      lengths: of answers as they are expected, in tokens, one for each sequence; None: evenly from
        short to the cap.

    Returns 0 where drafts do not pay. Raises InputError as `jspec.rollout` does, and without a
    draft.
    """
    sampling = Sampling() if sampling is None else sampling
    speculation = Speculation() if speculation is None else speculation
    batching = Batching() if batching is None else batching
    instance(Draft, "a draft, such as jspec.drafts.ngram(params)")("draft", draft)
    check(params, draft, batch, sampling, speculation, batching)
    sequences = len(batch.sequence_ids)
    if lengths is not None and len(lengths) != sequences:
        raise InputError(f"lengths must be one for each of the {sequences} sequences, and are "
                         f"{len(lengths)}")
    chooser = Chooser(sampling, speculation, batching, steps=1, say=log.info)
    return chooser.before(Plan(lengths=tuple(lengths or ())), 0, params, draft, batch).k
