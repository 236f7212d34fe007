"""A curriculum by difficulty: the more a prompt's answers differ, the sooner it comes again. How
hard a prompt is follows from how often this run has solved it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jspec.rl.order import Epochs, Order, Turns

RANKS = 12
"""Epochs of which the places of all records are kept."""


def success_rates(rewards: np.ndarray, failed: np.ndarray | None, groups: int) -> np.ndarray:
    """float64 [groups]: the mean reward of each group's answers, each reward taken as 0 below 0 and
    as 1 above 1; NaN of a group of which no answer could be graded.

    Args:
        rewards: float [N]. failed: bool [N], which of them could not be graded; None: none of them.
    """
    right = np.clip(rewards.reshape(groups, -1).astype(np.float64), 0, 1)
    graded = (np.ones_like(right) if failed is None
              else 1.0 - failed.reshape(groups, -1))
    count = graded.sum(1)
    return np.where(count > 0, (right * graded).sum(1) / np.maximum(count, 1), np.nan)


def intervals(success: np.ndarray, rest: float) -> np.ndarray:
    """After how many passes prompts of these success rates come again: 1 / (4 s (1 - s)), that is,
    1 for one that is solved half of the time, and the longer the less the rewards of its answers
    vary; `rest` at most, and 1 where nothing is known (NaN)."""
    spread = 4 * success * (1 - success)
    return np.where(np.isnan(spread), 1.0, 1 / np.maximum(spread, 1 / rest))


class Curriculum:
    """The order of a source's records by when they are due, in passes over them.

    A record is due in a pass, and there at the place that the epoch of that number has it at, so
    that the first pass is the first epoch. One that was drawn is due again after `intervals` of
    its success rate: the mean of the rate of its latest group and of what it was before that.
    """

    def __init__(self, epochs: Epochs, rest: float) -> None:
        self.epochs, self.rest, self.count = epochs, rest, epochs.count
        self.rank = functools.lru_cache(maxsize=RANKS)(self._rank)
        self.start(np.zeros(self.count), np.full(self.count, np.nan))

    def start(self, passes: np.ndarray, success: np.ndarray) -> None:
        """Goes to where each record is due in so many passes, float64 [count], and was solved at
        such a rate, float64 [count], NaN of those that nothing is known of."""
        self.passes, self.success, self.due = passes, success, np.empty(self.count)
        self.latest: tuple[np.ndarray, np.ndarray] = np.zeros(0, np.int64), np.zeros(0)
        self._place(np.arange(self.count))

    def _rank(self, epoch: int) -> np.ndarray:
        """float64 [count]: the place of each record in an epoch, 0 <= place < 1."""
        return np.argsort(self.epochs.order(epoch)) / self.count

    def _place(self, numbers: np.ndarray) -> None:
        epochs = np.floor(self.passes[numbers]).astype(np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = numbers[epochs == epoch]
            self.due[mine] = self.passes[mine] + self.rank(epoch)[mine]

    def take(self, start: int, count: int) -> list[int]:
        """The next `count` records, whatever was drawn before (`start`): those that are due first,
        each once as long as there are as many."""
        last = np.partition(self.due, min(count, self.count) - 1)[min(count, self.count) - 1]
        soon = np.flatnonzero(self.due <= last)
        return np.resize(soon[np.argsort(self.due[soon], kind="stable")][:count], count).tolist()

    def drew(self, numbers: Sequence[int] | np.ndarray) -> None:
        """These were drawn: they are due a pass later, until more is known."""
        which = np.unique(np.asarray(numbers, np.int64))
        self.latest = which, self.passes[which]
        self.passes[which] += 1
        self._place(which)

    def told(self, numbers: Sequence[int] | np.ndarray, success: np.ndarray) -> None:
        """The success rates, float64 [n], NaN where they are not known, of the records that were
        drawn last."""
        which, passes = self.latest
        now = np.full(self.count, np.nan)
        now[np.asarray(numbers, np.int64)] = success
        before, now = self.success[which], now[which]
        both = np.where(np.isnan(before), now, np.where(np.isnan(now), before, (before + now) / 2))
        self.success[which] = both
        self.passes[which] = passes + np.where(np.isnan(now), 1.0, intervals(both, self.rest))
        self._place(which)

    def drawn(self, count: int) -> np.ndarray:
        """int64: the records that were drawn (`count` in all), in their order."""
        return np.flatnonzero(self.passes)


class ByDifficulty(Order):
    """The order of several sources, each with a curriculum of its own. It depends on what it is
    told, so what it remembers is a part of the checkpoint."""

    def __init__(self, turns: Turns, sources: Sequence[Curriculum]) -> None:
        super().__init__(turns, sources)
        self.curricula = sources

    def drew(self, numbers: Sequence[int]) -> None:
        """These records were drawn."""
        for source, local, _ in self._of_each(numbers):
            source.drew(local)

    def told(self, numbers: Sequence[int], success: np.ndarray) -> None:
        """`Curriculum.told` of the records that were drawn last."""
        for source, local, mine in self._of_each(numbers):
            source.told(local, success[mine])

    def _of_each(self, numbers: Sequence[int]) -> Iterator[
            tuple[Curriculum, np.ndarray, np.ndarray]]:
        """Of each source those of these records that are its own, by its numbers, and which they
        are, bool."""
        every = np.asarray(numbers, np.int64)
        for source, start in zip(self.curricula, self.starts, strict=False):
            mine = (start <= every) & (every < start + source.count)
            yield source, every[mine] - start, mine

    def difficulties(self) -> dict[str, float]:
        """The share of all prompts of each difficulty, and of those of which nothing is known."""
        rate = np.concatenate([source.success for source in self.curricula])
        shares = {"unseen": np.isnan(rate), "never": rate == 0, "hard": (rate > 0) & (rate < 0.25),
                  "middling": (rate >= 0.25) & (rate <= 0.75),
                  "easy": (rate > 0.75) & (rate < 1), "always": rate == 1}
        return {f"curriculum/{name}": float(which.mean()) for name, which in shares.items()}

    def saved(self) -> dict[str, list]:
        """Of each record that was drawn in which pass it is due, and its success rate, as JSON has
        it."""
        passes, success = (np.concatenate([getattr(source, name) for source in self.curricula])
                           for name in ("passes", "success"))
        return {str(number): [float(passes[number]),
                              None if np.isnan(success[number]) else float(success[number])]
                for number in np.flatnonzero(passes).tolist()}

    def restore(self, said: Any) -> bool:
        """Goes to where it was `saved`; false for what was not, of these records."""
        count = int(self.starts[-1])
        passes, success = np.zeros(count), np.full(count, np.nan)
        if not isinstance(said, Mapping) or not all(
                is_place(number, count, pair) for number, pair in said.items()):
            return False
        for number, (due, rate) in said.items():
            passes[int(number)], success[int(number)] = due, np.nan if rate is None else rate
        for source, start, stop in zip(self.curricula, self.starts, self.starts[1:], strict=False):
            source.start(passes[start:stop].copy(), success[start:stop].copy())
        return True


def is_place(number: Any, count: int, pair: Any) -> bool:
    """Whether this is where one of `count` records is, as JSON has it."""
    if not (isinstance(number, str) and number.isdecimal() and int(number) < count
            and isinstance(pair, list) and len(pair) == 2):
        return False
    due, rate = pair
    return (isinstance(due, int | float) and 0 < due < 2**40
            and (rate is None or (isinstance(rate, int | float) and 0 <= rate <= 1)))
