"""The order of prompts: the shares of several sources, and which of its records each one gives."""

import random
from fractions import Fraction

import numpy as np
import pytest

from jspec.rl.order import Epochs, Order, Turns


def mixtures(count):
    drawn = random.Random(0)
    yield [Fraction(1)]
    yield [Fraction(1), Fraction(10**5), Fraction(1, 3)]
    for _ in range(count):
        yield [Fraction(drawn.randint(1, drawn.choice([3, 9, 1000])), drawn.choice([1, 1, 7, 10]))
               for _ in range(drawn.randint(2, 8))]


def test_shares_are_the_weights_to_within_a_prompt_at_every_position():
    for weights in mixtures(12):
        turns, had = Turns(weights), [0] * len(weights)
        within = 1 - Fraction(1, max(1, 2 * len(weights) - 2))
        owners = turns.of(0, 400).tolist()
        for position, owner in enumerate(owners, 1):
            had[owner] += 1
            wanted = [position * weight / sum(weights) for weight in weights]
            assert all(abs(a - b) <= within for a, b in zip(had, wanted, strict=True))
            if len(weights) == 2:
                assert had[0] == int(wanted[0] + Fraction(1, 2))
        assert turns.counts(400) == had
        assert Turns(weights).of(250, 400).tolist() == owners[250:]


def test_weights_may_be_as_far_apart_as_floats_are():
    for far in (Fraction("1e30"), Fraction("1e-30"), Fraction("3.4e38")):
        turns, often = Turns([far, Fraction(1)]), int(far < 1)
        assert turns.of(0, 50).tolist() == [often] * 50
        assert turns.counts(50)[often] == 50


def test_turns_repeat():
    turns = Turns([Fraction("0.3"), Fraction("0.7")])
    assert turns.period == 10 and turns.counts(10**12 + 10) == [3 * (10**11 + 1), 7 * (10**11 + 1)]
    assert turns.of(10**12, 10**12 + 10).tolist() == turns.of(0, 10).tolist()


def order(weights, counts, shuffle=True):
    return Order(Turns(list(map(Fraction, weights))),
                 [Epochs(count, 5, number, shuffle) for number, count in enumerate(counts)])


def test_every_source_has_epochs_of_its_own():
    taken = np.array(order((1, 2), (7, 10)).take(0, 60))
    first, second = taken[taken < 7], taken[taken >= 7] - 7
    assert (len(first), len(second)) == (20, 40)
    for of_source, count in ((first, 7), (second, 10)):
        for start in range(0, len(of_source) - count + 1, count):
            assert sorted(of_source[start:start + count]) == list(range(count))
    assert first[:7].tolist() != first[7:14].tolist()
    # as the first would be drawn alone, and the second not as the first
    assert first.tolist() == order((1,), (7,)).take(0, 20)
    assert second[:10].tolist() != order((1,), (10,)).take(0, 10)
    plain = order((1, 1), (2, 3), shuffle=False).take(0, 8)
    assert plain == [0, 2, 1, 3, 0, 4, 1, 2]


@pytest.mark.parametrize("start", [0, 1, 17, 59])
def test_an_order_goes_on_from_any_position(start):
    weights, counts = (3, "0.5", 1), (7, 3, 4)
    whole = order(weights, counts).take(0, 80)
    assert order(weights, counts).take(start, 80 - start) == whole[start:]
    drawn = order(weights, counts).drawn(start).tolist()
    assert len(set(drawn)) == len(drawn) and set(drawn) == set(whole[:start])
    of_first = [number for number in whole[:start] if number < 7]  # the latest ones last
    latest = sorted(set(of_first), key=lambda number: -of_first[::-1].index(number))
    assert [number for number in drawn if number < 7] == latest
