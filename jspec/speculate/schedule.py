"""`k = auto`: the schedule that promises the most tokens a second. Pure, on the host, in seconds
that were measured.

A schedule is judged by playing the chain of loops through (`played`): rows of the lengths that the
last answers had, each advanced in every cycle by one token and as many drafts as chance accepts at
the rates seen. So what speculation loses to rows that wait for the unluckiest one is in the
account.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jspec.speculate.types import Schedule

MOST, WITH_MANY, POSITIONS = 15, 7, 256
"""The most that is drafted by choice: WITH_MANY, and up to MOST where the rows are so few that a
cycle looks at no more than POSITIONS, for which an accelerator only reads its weights."""
MARGIN = 0.03
"""By what share another schedule has to be faster than the one there is, or than no draft: each one
is compiled, and costs and acceptance are estimates."""
LONGEST = 512
"""Longer answers are played at a smaller scale: a choice takes milliseconds."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What was measured on a device, of one policy, draft and way of sampling. Rows are those of
    one shard of the batch.

    Attributes:
      rows: of each loop of the chain, ever fewer.
      shards: of the batch axes, each of which goes through its own chain.
      plain: (rows, seconds) of a cycle without a draft.
      drafting: (rows, k, seconds) of a cycle with one; k = 0: it drafts nothing, and is kept up to
        date.
      start: seconds that a rollout with a draft takes beside its cycles, more than one without.
      compiling: seconds, about, that a rollout's program takes to compile.
    """

    rows: tuple[int, ...]
    shards: int
    plain: tuple[tuple[int, float], ...]
    drafting: tuple[tuple[int, int, float], ...]
    start: float = 0.0
    compiling: float = 0.0

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Costs:
        """From what `dataclasses.asdict` and JSON left of it."""
        return cls(**fields | {"rows": tuple(fields["rows"]),
                               "plain": tuple(map(tuple, fields["plain"])),
                               "drafting": tuple(map(tuple, fields["drafting"]))})

    def of_plain(self, rows: int) -> float:
        """Seconds of a cycle without a draft, between measured rows by interpolation."""
        return _line(rows, self.plain)

    def of_drafting(self, rows: int, k: int) -> float:
        """Seconds of a cycle with a draft. Where k = 0 was not measured, it takes what no draft
        takes."""
        by_rows = []
        for measured in sorted({r for r, _, _ in self.drafting}):
            points = ({0: self.of_plain(measured)}
                      | {j: s for r, j, s in self.drafting if r == measured})
            by_rows.append((measured, _line(k, tuple(points.items()))))
        return _line(rows, tuple(by_rows))


def _line(x: float, points: Sequence[tuple[float, float]]) -> float:
    """The value at x of the line through points, straight on beyond the last one, level before the
    first."""
    xs, ys = map(np.array, zip(*sorted(points), strict=True))
    if x > xs[-1] and len(xs) > 1:
        return float(ys[-1] + (x - xs[-1]) * max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])))
    return float(np.interp(x, xs, ys))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to draft, and why.

    Attributes:
      k: a schedule whose bounds are the chain's own, or 0: no draft.
      seconds, plain_seconds: of decoding as it is expected, and without a draft.
    """

    k: int | Schedule
    seconds: float
    plain_seconds: float

    @property
    def speedup(self) -> float:
        """Expected, over no draft."""
        return self.plain_seconds / self.seconds


def rates(acceptance: Sequence[float], k: int) -> np.ndarray:
    """float [k]: how often all drafts up to each position are accepted. Beyond what is known, as
    often after one another as at last."""
    known = list(np.minimum.accumulate(np.clip(acceptance, 0.0, 1.0))) if len(acceptance) else [0.0]
    before = known[-2] if len(known) > 1 else 1.0
    ratio = known[-1] / before if before else 0.0
    while len(known) < k:
        known.append(known[-1] * ratio)
    return np.array(known[:k])


def played(lengths: np.ndarray, chain: Sequence[tuple[int, int]],
           acceptance: Sequence[float]) -> list[int]:
    """Cycles of every loop of a chain of (rows, k), for sequences of these lengths on one shard:
    what `loops.decode` would go through."""
    chance, waiting = np.random.default_rng(0), np.asarray(lengths)
    slots = chain[0][0]
    left, waiting = waiting[:slots], waiting[slots:]
    cycles = []
    for i, (_, k) in enumerate(chain):
        fit, accepted = chain[i + 1][0] if i + 1 < len(chain) else 0, rates(acceptance, k)
        count = 0
        while len(waiting) or len(left) > fit:
            count += 1
            left = left - 1 - (chance.random((len(left), 1)) < accepted).sum(1)
            left = left[left > 0]
            if len(waiting):
                free = slots - len(left)
                left, waiting = np.concatenate([left, waiting[:free]]), waiting[free:]
        cycles.append(count)
    return cycles


def choose_schedule(costs: Costs, acceptance: Sequence[float], lengths: Sequence[int], *,
                    current: int | Schedule | None = None, steps: int = 1) -> Choice:
    """The schedule with the least seconds for answers like the last ones.

    Args:
      acceptance: by draft position, how often that draft and all before it were accepted.
      lengths: of all sequences of a rollout, in their order.
      current: the schedule there is; another one has to be worth its compilation in the `steps`
        that are left. None: there is none yet.

    Returns what promises the least, and `current` or no draft where that is not less by `MARGIN`.
    """
    scale = max(1.0, max(lengths) / LONGEST)
    parts = np.array_split(np.maximum(np.ceil(np.asarray(lengths) / scale), 1).astype(int),
                           costs.shards)

    def plain(part: np.ndarray) -> float:
        cycles = played(part, [(rows, 0) for rows in costs.rows], ())
        return (scale * sum(n * costs.of_plain(rows)
                            for n, rows in zip(cycles, costs.rows, strict=True)))

    slowest = max(parts, key=plain)  # the others are there before it
    without = plain(slowest)

    def seconds(k: int | Schedule) -> float:
        if not k or isinstance(k, int):
            return without
        chain = sorted(k, reverse=True)
        cycles = played(slowest, chain, acceptance)
        return (costs.start + scale * sum(n * costs.of_drafting(*at)
                                          for n, at in zip(cycles, chain, strict=True)))

    best = min(_candidates(costs, acceptance), key=seconds, default=0)
    if seconds(best) > (1 - MARGIN) * without:
        best = 0
    if current is not None:
        gain = seconds(current) - seconds(best)
        if gain <= MARGIN * seconds(current) or gain * steps <= costs.compiling:
            best = current
    return Choice(best, seconds(best), without)


def longest(rows: int) -> int:
    """The most that a loop of so many rows drafts by choice."""
    return min(MOST, max(WITH_MANY, POSITIONS // rows - 1))


def _candidates(costs: Costs, acceptance: Sequence[float]) -> set[Schedule]:
    """Schedules worth a trial: of each loop the k that is best for itself; fewer, for the rows that
    wait for the last; and none in the loops of many rows."""
    expected = 1 + np.cumsum([0.0, *rates(acceptance, MOST)])
    best = [min(range(longest(rows) + 1),
                key=lambda k, rows=rows: costs.of_drafting(rows, k) / expected[k])
            for rows in costs.rows]
    capped = [tuple(min(k, cap) for k in best) for cap in range(1, MOST + 1)]
    late = [tuple(k if i >= first else 0 for i, k in enumerate(best)) for first in range(len(best))]
    return {tuple(sorted(zip(costs.rows, ks, strict=True))) for ks in {*capped, *late} if any(ks)}


def in_words(k: int | Schedule) -> str:
    """A schedule as a run says it."""
    if isinstance(k, int):
        return f"k = {k}" if k else "no draft"
    ks = [k for _, k in k]
    if len(set(ks)) == 1:
        return f"k = {ks[0]}"
    return "k = " + ", ".join(f"{drafted} with up to {rows} rows" for rows, drafted in k)


def reason(choice: Choice, costs: Costs, acceptance: Sequence[float]) -> str:
    """Why, in one line."""
    drafting = () if isinstance(choice.k, int) else [(rows, k) for rows, k in choice.k if k]
    rows = max((rows for rows, _ in drafting), default=costs.rows[0])
    ks = sorted({k for _, k in drafting}) or [1, 3]
    plain = costs.of_plain(rows)
    cycles = ", ".join(f"{costs.of_drafting(rows, k) / plain:.2f} times that with k = {k}"
                       for k in ks)
    accepted = " ".join(f"{rate:.0%}" for rate in rates(acceptance, min(max(3, *ks), WITH_MANY)))
    worth = f"{choice.speedup:.2f}x of no draft is expected" if choice.k else "drafts do not pay"
    return (f"{in_words(choice.k)}: {worth} (accepted by position {accepted}; at {rows} rows "
            f"a plain cycle takes {1e3 * plain:.3g} ms, {cycles})")
