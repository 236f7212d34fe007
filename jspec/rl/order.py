"""The order of a run's prompts: whose turn it is among several sources, and which of its records a
source gives then. Both follow from the position alone, so that a run goes on from any (but see
`jspec.rl.curriculum`)."""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

GROWTH = 4096
"""By how many turns at least a table of them grows."""


class Turns:
    """Whose turn each position is, of parts with weights: among the first p positions, for every
    p, a part of share w has its w p to within 1 - 1/(2n - 2) for n parts (two: within a half), so
    never a whole one too many or too few.

    Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): of the
    parts that would not have too many, the one that would have too few first. As weights are
    fractions, turns repeat: they are kept up to where they do, and found as far as they are asked
    for.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """weights: above 0."""
        whole = [int(weight * math.lcm(*(w.denominator for w in weights))) for weight in weights]
        self.shares = [share // math.gcd(*whole) for share in whole]
        self.period = sum(self.shares)
        self.owners = array("H")

    def of(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the part whose turn each of these positions is."""
        # positions fit into int64, which a period of far-apart weights need not
        places = np.arange(start, stop) % min(self.period, 2**62)
        return self._known(int(places.max(initial=-1)) + 1)[places].astype(np.int64)

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` turns each part has."""
        whole, rest = divmod(position, self.period)
        inside = np.bincount(self._known(rest)[:rest], minlength=len(self.shares)).tolist()
        return [whole * share + count for share, count in zip(self.shares, inside, strict=True)]

    def _known(self, count: int) -> np.ndarray:
        """The owners of the first turns of a period, `count` of them at least."""
        if count > len(self.owners):
            self._grow(min(self.period, max(count, len(self.owners) + GROWTH)))
        return np.frombuffer(self.owners, np.uint16)

    def _grow(self, count: int) -> None:
        halves, common = max(1, 2 * len(self.shares) - 2), math.lcm(*self.shares)
        parts = range(len(self.shares))
        had = np.bincount(np.frombuffer(self.owners, np.uint16),
                          minlength=len(self.shares)).tolist()
        owners = array("H", self.owners)  # the old one is looked at by who was given a view of it

        def too_few_from(part: int) -> int:
            """The position from which a part has too few without another turn, times `common`."""
            return ((had[part] + 1) * halves - 1) * (common // self.shares[part])

        for position in range(len(owners) + 1, count + 1):
            owner = min((part for part in parts if halves * (
                position * self.shares[part] - had[part] * self.period) >= self.period),
                key=too_few_from)
            had[owner] += 1
            owners.append(owner)
        self.owners = owners


class Epochs:
    """The order of a source's records: all of them, and all again, each time shuffled anew."""

    def __init__(self, count: int, seed: int, number: int, shuffle: bool) -> None:
        """number: of the source; the first one has the order that it would have alone."""
        self.count, self.shuffle = count, shuffle
        self.seed = seed, [number] if number else []
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        """int64 [count]. Not grain's: for few records that takes milliseconds for each, and its
        epoch e of seed s is epoch e - 1 of seed s + 1."""
        if not self.shuffle:
            return np.arange(self.count)
        seed, number = self.seed
        return np.random.default_rng([seed, epoch, *number]).permutation(self.count)

    def take(self, start: int, count: int) -> list[int]:
        """The records of so many draws from the `start`-th on."""
        return [int(self.order(draw // self.count)[draw % self.count])
                for draw in range(start, start + count)]

    def drawn(self, count: int) -> np.ndarray:
        """int64: the records of the first `count` draws, each once, the latest ones last."""
        epoch, inside = divmod(count, self.count)
        now, before = (self.order(epoch)[:inside],
                       self.order(epoch - 1) if epoch else np.zeros(0, np.int64))
        return np.concatenate([before[~np.isin(before, now)], now])


class Draws(Protocol):
    """How a source gives its `count` records, as `Epochs` does."""

    count: int

    def take(self, start: int, count: int) -> list[int]: ...

    def drawn(self, count: int) -> np.ndarray: ...


class Order:
    """The numbers of the records at each position, those of all sources counted through."""

    def __init__(self, turns: Turns, sources: Sequence[Draws]) -> None:
        self.turns, self.sources = turns, sources
        self.starts = np.cumsum([0, *(source.count for source in sources)])

    def take(self, start: int, count: int) -> list[int]:
        """The records of so many positions from `start` on."""
        turns, before = self.turns.of(start, start + count), self.turns.counts(start)
        numbers = np.empty(count, np.int64)
        for part, source in enumerate(self.sources):
            mine = turns == part
            numbers[mine] = self.starts[part] + np.array(
                source.take(before[part], int(mine.sum())), np.int64)
        return numbers.tolist()

    def drawn(self, position: int) -> np.ndarray:
        """int64: the records of the first `position` positions, each once, of each source the
        latest ones last."""
        counts = self.turns.counts(position)
        return np.concatenate([start + source.drawn(count) for start, source, count in
                               zip(self.starts[:-1], self.sources, counts, strict=True)])
