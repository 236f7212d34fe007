"""Scores of several answers, against every subset of them."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from jspec.rl.scores import by_prompt, interval, majority_at_k, pass_at_k
from jspec.rl.votes import vote_of


def passes(right, k):
    """pass@k of all subsets, counted."""
    chosen = list(itertools.combinations(right, k))
    return Fraction(sum(any(subset) for subset in chosen), len(chosen))


def vote(votes, right):
    """What the vote of some answers is worth, with its definition for code."""
    counts = Counter(v for v in votes if v is not None)
    top = [v for v in counts if counts[v] == max(counts.values())]
    return Fraction(0) if not top else sum(right[v] for v in top) / len(top)


def majority(votes, right, k):
    """maj@k of all subsets, counted."""
    worth = {v: Fraction(sum(r for w, r in zip(votes, right, strict=True) if w == v),
                         votes.count(v)) for v in votes}
    chosen = list(itertools.combinations(votes, k))
    return sum(vote(subset, worth) for subset in chosen) / len(chosen)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_that_of_every_subset(n):
    cases = np.array([[i < c for i in range(n)] for c in range(n + 1)])
    for k in range(1, n + 1):
        expected = [float(passes(case, k)) for case in cases.tolist()]
        np.testing.assert_allclose(pass_at_k(cases, k), expected, rtol=1e-14, atol=0)


def test_pass_at_k_where_others_are_wrong():
    """A bootstrap with replacement says 0.651 and 0.412; 1.0 where k is above n is no answer."""
    one_of_eight = np.arange(8)[None] == 3
    assert pass_at_k(one_of_eight, 8)[0] == 1 and pass_at_k(one_of_eight, 4)[0] == 0.5
    with pytest.raises(ValueError, match="of 4 answers k is 1 to 4, not 8"):
        pass_at_k(np.zeros((1, 4), bool), 8)
    with pytest.raises(ValueError, match="of 2 answers k is 1 to 2, not 3"):
        majority_at_k(["a", "b"], [True, False], 3)
    many = pass_at_k(np.arange(5000)[None] < 2, 2500)[0]  # C(n, k) has 1,500 digits
    assert many == pytest.approx(1 - 2500 * 2499 / (5000 * 4999), rel=1e-12)


def partitions(n, largest=None):
    """All ways to write n as a sum, largest first."""
    if n == 0:
        yield ()
    for first in range(min(n, largest or n), 0, -1):
        yield from ((first, *rest) for rest in partitions(n - first, first))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_majority_at_k_is_that_of_every_subset(n):
    """Of all ways in which n answers agree: each kind right, and one kind that does not vote."""
    for sizes in partitions(n):
        kinds = [kind for kind, size in enumerate(sizes) for _ in range(size)]
        for right, silent in itertools.product(range(len(sizes)), (None, *range(len(sizes)))):
            votes = [None if kind == silent else kind for kind in kinds]
            truth = [kind == right != silent for kind in kinds]
            for k in range(1, n + 1):
                assert majority_at_k(votes, truth, k) == pytest.approx(
                    float(majority(votes, truth, k)), rel=1e-12, abs=1e-15), (votes, truth, k)


def test_majority_at_k_of_larger_ones_and_of_answers_that_are_right_in_part():
    rng = np.random.default_rng(0)
    for _ in range(20):
        votes = [None if v == 3 else int(v) for v in rng.integers(4, size=9)]
        truth = [bool(r) for r in rng.integers(2, size=9)]
        k = int(rng.integers(1, 10))
        assert majority_at_k(votes, truth, k) == pytest.approx(float(majority(votes, truth, k)))


def test_ties_are_shared_whatever_the_order():
    """By the first one seen 'b' would win one time and 'a' the other."""
    for votes in (["a", "b", "b", "a"], ["b", "a", "a", "b"]):
        right = [v == "a" for v in votes]
        assert majority_at_k(votes, right, 4) == 0.5 == pytest.approx(
            majority_at_k(votes, right, 2))
    assert majority_at_k([None, None], [True, True], 2) == 0
    # five right and three of one other: the plain vote of all
    assert majority_at_k([1] * 5 + [2] * 3, [True] * 5 + [False] * 3, 8) == 1


def test_majority_at_k_of_a_thousand_answers_is_no_overflow():
    """Of two kinds, 60 and 40 in a hundred, half of them drawn: nearly always the first."""
    votes = [0] * 660 + [1] * 440
    assert majority_at_k(votes, [v == 0 for v in votes], 550) == pytest.approx(1, abs=1e-9)
    assert majority_at_k(votes, [v == 0 for v in votes], 1) == pytest.approx(0.6, rel=1e-10)


def test_scores_by_prompt_and_their_interval():
    rewards = np.array([[1.0, 0.5, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]], np.float32)
    votes = [["1", "2", None, "1"], ["1", "1", "1", "1"]]
    scores = by_prompt(rewards, votes, (1, 4), 1.0)
    assert list(scores) == ["mean@4", "pass@1", "pass@4", "maj@4"]
    assert {name: value.tolist() for name, value in scores.items()} == {
        "mean@4": [0.625, 0.5], "pass@1": [0.5, 0.0], "pass@4": [1.0, 0.0], "maj@4": [1.0, 0.0]}
    assert by_prompt(rewards, votes, (1,), 0.5)["pass@1"].tolist() == [0.75, 1.0]
    values = np.arange(100) < 30
    low, high = interval(values)
    half = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert abs(low - (0.3 - half)) < 0.02 and abs(high - (0.3 + half)) < 0.02
    assert interval(values) == (low, high) and interval(np.ones(3)) == (1.0, 1.0)


def test_a_reward_of_float32_is_right_from_what_was_said():
    assert by_prompt(np.float32([[0.7]]), [["x"]], (1,), 0.7)["pass@1"].tolist() == [1.0]


@pytest.mark.parametrize("same, other", [
    (["The answer is 0.5.", r"so \boxed{\frac{1}{2}}", "<answer>1/2 cm</answer>", "x = 0.50"], "2"),
    ([r"\boxed{\{1, 2\}}", r"\boxed{2 and 1}"], r"\boxed{(1, 2)}"),
    ([r"\boxed{x + 1}", r"\boxed{x+1}"], r"\boxed{x - 1}"),
    ([r"\boxed{\text{Tuesday}}", "<answer>tuesday</answer>"], r"\boxed{\text{Monday}}")])
def test_what_says_the_same_votes_for_the_same(same, other):
    votes = {vote_of(response, "1", math=True) for response in same}
    assert len(votes) == 1 and None not in votes and vote_of(other, "1", math=True) not in votes


def test_votes_of_what_was_cut_off_and_of_rewards_that_read_no_mathematics():
    assert vote_of("it is 42", "1", finished=False, math=True) is None
    assert vote_of("", "1", math=True) is None is vote_of(" \n", "1", math=False)
    # what is right in words is asked for in words
    assert vote_of("blue", "red", math=True) == vote_of("Blue", "red", math=True)
    assert vote_of(" 12 21 ", "1", math=False) == "12 21" != vote_of("12  21", "1", math=False)
    assert vote_of("I think <answer> 7\n</answer>!", "1", math=False) == "7"
