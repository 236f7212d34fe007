"""How long answers are, and what becomes of a rollout's rows as they end."""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
import statistics
from collections.abc import Sequence

import numpy as np

from jspec import arguments
from jspec.errors import InputError

MEDIAN, SIGMA = 0.25, 0.8
"""Of the tail: its median over the cap, and the deviation of the lengths' logarithm."""
MOST_SIGMA = 10
"""Beyond it answers are one token or cut at the cap, and numbers overflow."""


def constant(count: int, length: float) -> np.ndarray:
    """float [count]: all alike."""
    return np.full(count, float(length))


def tail(count: int, cap: int, median: float | None = None, sigma: float = SIGMA) -> np.ndarray:
    """float [count]: quantiles of a lognormal distribution, cut at the cap as answers are."""
    median = cap * MEDIAN if median is None else median
    normal = statistics.NormalDist()
    deviations = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    return np.clip(median * np.exp(sigma * np.array(deviations)), 1, cap)


def of_measured(count: int, lengths: Sequence[float]) -> np.ndarray:
    """float [count]: quantiles of lengths that were measured."""
    return np.quantile(np.asarray(lengths, float), (np.arange(count) + 0.5) / count)


def shuffled(lengths: np.ndarray) -> np.ndarray:
    """In an order that is the same every time: which answer is long is not known beforehand."""
    return np.random.default_rng(0).permutation(lengths)


def parse(text: str, count: int, cap: int) -> np.ndarray:
    """float [count], in any order, of what an option says: `constant[:TOKENS]` (the cap where none
    are named), `tail[:MEDIAN[:SIGMA]]`, or a file with a JSON list or a number a line. Raises
    InputError."""
    kind, *values = text.split(":")
    if kind not in ("constant", "tail"):
        measured = read(text)
        if max(measured) > cap:
            raise InputError(f"--lengths {text} has an answer of {max(measured):g} tokens, more "
                             f"than sampling.max_new_tokens = {cap}; raise that, or cut them")
        return shuffled(of_measured(count, measured))
    try:
        given = [float(value) for value in values]
    except ValueError:
        given = [math.nan]
    known = {"constant": 1, "tail": 2}[kind]
    if len(given) > known or not all(0 < value < math.inf for value in given):
        raise InputError(f"--lengths {text!r}: {kind} takes up to {known} numbers above 0, such as "
                         f"{'constant:1024' if kind == 'constant' else 'tail:2000:0.8'}")
    if given and not 1 <= given[0] <= cap:
        raise InputError(f"--lengths {text!r}: {given[0]:g} tokens must be at least 1 and at most "
                         f"sampling.max_new_tokens = {cap}")
    if given[1:] and given[1] > MOST_SIGMA:
        raise InputError(f"--lengths {text!r}: the deviation {given[1]:g} is of the lengths' "
                         f"logarithm; at most {MOST_SIGMA}, such as tail:2000:0.8")
    return shuffled(constant(count, *(given or [cap])) if kind == "constant"
                    else tail(count, cap, *given))


def read(name: str) -> list[float]:
    """The lengths in a file. Raises InputError."""
    path = arguments.path("--lengths", name)
    if not (path.is_file() or path.is_fifo()):
        raise InputError(f"--lengths {name}: there is no such file; name one with a JSON list or a "
                         "number a line, or say constant or tail")
    try:
        text = path.read_text()
        numbers = json.loads(text) if text.lstrip().startswith("[") else text.split()
        lengths = [float(number) for number in numbers]
    except (OSError, ValueError, TypeError):
        raise InputError(f"--lengths {name} is no JSON list of numbers and has no number a line; "
                         "write the answers' lengths in tokens") from None
    if not lengths or not all(1 <= length < math.inf for length in lengths):
        raise InputError(f"--lengths {name}: lengths must be at least 1 token, and there must be "
                         "one at least")
    return lengths


@dataclasses.dataclass(frozen=True)
class Spans:
    """A rollout between one answer's end and the next, float [spans] each.

    Attributes:
      group: int, of which group of shards.
      tokens: that every live row gets in the span; over tokens a cycle they are its cycles.
      live: rows of a shard that are still at work, a mean over the group's.
      context: positions of a shard's live rows together, in the middle of the span.
    """

    group: np.ndarray
    tokens: np.ndarray
    live: np.ndarray
    context: np.ndarray


def spans(lengths: np.ndarray, groups: int, shards: int, slots: int, prompt: float) -> Spans:
    """How rows shrink: `lengths` float [N], dealt to groups in their order, each of `shards` shards
    that go through every cycle together, with `slots` rows a shard. Where one ends the next that
    waits takes its slot. A row advances by as many tokens a cycle as any other: what is lost by
    waiting for the unluckiest is left out, little in answers of hundreds of tokens."""
    parts = [_group(part, slots * shards, prompt) for part in np.array_split(lengths, groups)]
    return Spans(np.repeat(np.arange(groups), [len(part[0]) for part in parts]),
                 *(np.concatenate(columns) / scale for columns, scale in
                   zip(zip(*parts, strict=True), (1, shards, shards), strict=True)))


def _group(lengths: np.ndarray, slots: int, prompt: float) -> tuple[np.ndarray, ...]:
    """(tokens, live, context) of one group's spans; the last two of all its shards."""
    ends = [float(length) for length in lengths[:slots]]
    starts = [0.0] * len(ends)
    heap = list(ends)
    heapq.heapify(heap)
    for length in lengths[slots:]:
        starts.append(heapq.heappop(heap))
        ends.append(starts[-1] + float(length))
        heapq.heappush(heap, ends[-1])
    begun, ended = np.sort(starts), np.sort(ends)
    at = np.unique(np.concatenate([begun, ended]))
    start_of, end_of = np.array(starts), np.array(ends)
    by_end = start_of[np.argsort(end_of)]
    total = np.concatenate([[0.0], np.cumsum(begun)]), np.concatenate([[0.0], np.cumsum(by_end)])
    count = np.searchsorted(begun, at[:-1], "right"), np.searchsorted(ended, at[:-1], "right")
    live = count[0] - count[1]
    middle = (at[1:] + at[:-1]) / 2
    context = live * (prompt + middle) - (total[0][count[0]] - total[1][count[1]])
    return np.diff(at), live, context
