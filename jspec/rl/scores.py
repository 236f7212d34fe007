"""Scores of n answers to each of several prompts: what one answer is worth, what the best of k is,
and what the vote of k is.

All are exact expectations over the subsets of k of the n answers, of each prompt by itself; a score
of several prompts is their mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 10_000
"""Of a bootstrap."""
Vote = Hashable | None
"""What an answer votes for; None: it casts no vote."""


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """The probability that one of k of a prompt's answers is right: 1 - C(n - c, k) / C(n, k) for c
    right ones of n, without replacement.

    Args:
      right: bool [P, n].

    Returns float64 [P]. Raises ValueError for a k that is not in 1 ... n.
    """
    n = _checked(right.shape[1], k)
    counts, where = np.unique(right.sum(1), return_inverse=True)
    chances = [1 - math.comb(n - int(c), k) / math.comb(n, k) for c in counts]
    return np.array(chances, np.float64)[where.reshape(-1)]


def majority_at_k(votes: Sequence[Vote], right: Sequence[bool], k: int) -> float:
    """The probability that the vote of k of a prompt's answers is right, over all subsets of k. The
    vote takes the answer that most of them gave, and of several that are level each with the same
    probability; where nobody votes nothing is right. An answer that is right in some responses and
    not in others counts as right to the share of those.

    Args:
      votes, right: of n answers, of which those with the same vote are one answer.

    Raises ValueError for a k that is not in 1 ... n.
    """
    n = _checked(len(votes), k)
    sizes = Counter(vote for vote in votes if vote is not None)
    shares = dict.fromkeys(sizes, 0.0)
    for vote, is_right in zip(votes, right, strict=True):
        if vote is not None:
            shares[vote] += is_right / sizes[vote]
    if k == n:
        top = [vote for vote in sizes if sizes[vote] == max(sizes.values())]
        return sum(shares[vote] for vote in top) / max(len(top), 1)
    # The counts in a subset of k are independent binomial ones, of any probability, given that they
    # add up to k: with k / n no number is too small, however many answers there are.
    alike, expected = Counter(sizes.values()), 0.0
    worth = {size: sum(shares[vote] for vote in sizes if sizes[vote] == size) for size in alike}
    for top in range(1, min(k, max(alike, default=0)) + 1):
        for size in (size for size in alike if size >= top and worth[size]):
            others = _others(alike - Counter([size]), n - sizes.total(), top, k, k / n)[k - top]
            wins = (others / np.arange(1, len(others) + 1)).sum()
            expected += worth[size] * _binomial(size, top, k / n) * wins
    return float(expected / _binomial(n, k, k / n))


def _others(alike: Counter[int], silent: int, top: int, k: int, p: float) -> np.ndarray:
    """float64 [k + 1, k // top + 1]: the probability that so many answers are drawn, so many of
    their kinds `top` times each and no kind more often; and of `silent` ones however many.

    alike: how many kinds there are of so many answers each. p: of drawing any one.
    """
    table = np.zeros((k + 1, k // top + 1))
    table[0, 0] = 1.0
    for size in alike.elements():
        drawn = np.zeros_like(table)
        for count in range(min(size, top - 1) + 1):
            drawn[count:] += _binomial(size, count, p) * table[:k + 1 - count]
        if size >= top:
            drawn[top:, 1:] += _binomial(size, top, p) * table[:k + 1 - top, :-1]
        table = drawn
    drawn = np.zeros_like(table)
    for count in range(min(silent, k) + 1):
        drawn[count:] += _binomial(silent, count, p) * table[:k + 1 - count]
    return drawn


def _binomial(n: int, k: int, p: float) -> float:
    """The probability of k among n, each of probability p, 0 < p < 1."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


def _checked(n: int, k: int) -> int:
    if not 1 <= k <= n:
        raise ValueError(f"of {n} answers k is 1 to {n}, not {k}")
    return n


def by_prompt(rewards: np.ndarray, votes: Sequence[Sequence[Vote]], at: Sequence[int],
              right_from: float) -> dict[str, np.ndarray]:
    """Every score of each prompt: `mean@n`, the mean reward of its n answers, and for every k of
    `at` `pass@k`, and `maj@k` above 1.

    Args:
      rewards: float [P, n]. votes: [P][n].
      right_from: an answer is right whose reward is at least this.

    Returns float64 [P] by name.
    """
    right = rewards >= np.asarray(right_from, rewards.dtype)
    scores = {f"mean@{rewards.shape[1]}": rewards.astype(np.float64).mean(1)}
    scores |= {f"pass@{k}": pass_at_k(right, k) for k in at}
    return scores | {f"maj@{k}": np.array([majority_at_k(*one, k) for one in
                                           zip(votes, right.tolist(), strict=True)])
                     for k in at if k > 1}


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean of values float [P]: the percentile bootstrap over them, of
    `RESAMPLES` resamples, always the same ones."""
    generator, means = np.random.default_rng(0), []
    for _ in range(0, RESAMPLES, 1000):  # of thousands of prompts not all at once
        means.append(values[generator.integers(len(values), size=(1000, len(values)))].mean(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)
