"""`choose_schedule` on planted costs: drafts where they pay, none where they do not, and few
changes of mind."""

import dataclasses
import json

import numpy as np
import pytest

from jspec.speculate.schedule import Costs, choose_schedule, longest, played, rates, reason

LENGTHS = np.random.default_rng(0).exponential(60, 32).clip(1, 200).astype(int)
GOOD, POOR = (0.8, 0.65, 0.5), (0.05, 0.01)


def planted(slope, *, rows=(32, 8), shards=1, **fields):
    """A plain cycle takes 0.01 s with 8 rows and 0.03 s with 32; each draft adds that share of
    it."""
    plain = ((8, 0.01), (32, 0.03))
    return Costs(rows, shards, plain,
                 tuple((r, k, s * (1 + slope * k)) for r, s in plain for k in (0, 3)), **fields)


def test_a_draft_that_costs_nothing_is_drafted_at_length_and_a_dear_one_never():
    free = choose_schedule(planted(0), GOOD, LENGTHS)
    assert free.k == ((8, 7), (32, 7)) and free.speedup > 2
    # copied text, of which few refuse a draft: longer ones where few rows look at few positions
    assert choose_schedule(planted(0), (0.95, 0.91, 0.87), LENGTHS).k == ((8, 15), (32, 7))
    assert choose_schedule(planted(1), GOOD, LENGTHS).k == 0
    assert choose_schedule(planted(0), (), LENGTHS).k == 0  # nothing is known to be accepted
    assert choose_schedule(planted(0.1), POOR, LENGTHS).k == 0
    between = choose_schedule(planted(0.2), GOOD, LENGTHS)
    assert all(0 < k < 7 for _, k in between.k) and 1.03 < between.speedup < free.speedup


def test_as_many_positions_are_looked_at_as_cost_nothing():
    assert [longest(rows) for rows in (1, 16, 17, 24, 32, 512)] == [15, 15, 14, 9, 7, 7]


def test_it_drafts_only_where_few_rows_are_left_if_only_there_it_pays():
    costs = dataclasses.replace(planted(0.1), drafting=((8, 3, 0.011), (32, 0, 0.03), (32, 3, 0.2)))
    ks = dict(choose_schedule(costs, GOOD, LENGTHS).k)
    assert ks[8] > 0 == ks[32]
    # to follow costs more
    kept = dataclasses.replace(costs, drafting=((8, 3, 0.011), (32, 0, 0.3), (32, 3, 0.4)))
    assert choose_schedule(kept, GOOD, LENGTHS).k == 0


@pytest.mark.parametrize("seed", range(8))
def test_what_is_chosen_never_promises_less_than_no_draft(seed):
    chance = np.random.default_rng(seed)
    costs = planted(chance.uniform(0, 0.5), start=chance.uniform(0, 1),
                    shards=int(chance.integers(1, 5)))
    acceptance = np.sort(chance.uniform(0, 1, 3))[::-1]
    choice = choose_schedule(costs, acceptance, chance.integers(1, 300, 32))
    assert choice.seconds <= choice.plain_seconds
    assert choice.k == 0 or choice.speedup >= 1 / 0.97


def test_what_the_beginning_takes_decides_over_short_answers():
    costs = planted(0.1, start=0.3)
    assert choose_schedule(costs, GOOD, [8] * 32).k == 0
    assert choose_schedule(costs, GOOD, [200] * 32).k != 0


def test_another_schedule_must_be_worth_its_compilation():
    costs = planted(0.2, compiling=30.0)
    best = choose_schedule(costs, GOOD, LENGTHS)
    near = ((8, 3), (32, 2))  # 1.3% slower
    assert best.k == ((8, 3), (32, 3))
    assert choose_schedule(costs, GOOD, LENGTHS, current=near, steps=10**6).k == near
    assert choose_schedule(costs, GOOD, LENGTHS, current=0, steps=3).k == 0
    assert choose_schedule(costs, GOOD, LENGTHS, current=0, steps=1000).k == best.k
    assert (choose_schedule(planted(1, compiling=30.0), GOOD, LENGTHS, current=best.k, steps=1000).k
            == 0)


def test_the_chain_is_played_as_it_runs():
    lengths = np.array([5, 1, 3, 2, 9, 4])
    assert played(lengths, ((6, 0),), ()) == [9]
    assert played(lengths, ((6, 0), (2, 0)), ()) == [4, 5]
    # two slots: 3 begins after 1, 2 after 4, 9 after 5, and 4 after 6, which ends at 10, 4 before
    # the last
    assert played(lengths, ((2, 0), (1, 0)), ()) == [10, 4]
    assert played(np.array([8]), ((1, 3),), (1.0, 1.0, 1.0)) == [2]
    assert played(np.array([9, 9]), ((2, 1), (1, 3)), (1.0,)) == [5, 0]


def test_beyond_what_is_known_acceptance_goes_on_falling_as_it_did():
    np.testing.assert_allclose(rates((0.8, 0.4), 4), [0.8, 0.4, 0.2, 0.1])
    np.testing.assert_allclose(rates((0.5,), 3), [0.5, 0.25, 0.125])
    np.testing.assert_allclose(rates((0.5, 0.6), 2), [0.5, 0.5])
    assert rates((), 3).tolist() == [0, 0, 0] and rates((0.0, 0.0), 3).tolist() == [0, 0, 0]


def test_costs_between_points_are_on_a_line():
    costs = planted(0.5)
    assert costs.of_plain(20) == pytest.approx(0.02) and costs.of_plain(2) == 0.01
    assert (costs.of_drafting(8, 1) == pytest.approx(0.015) and costs.of_drafting(8, 5)
            == pytest.approx(0.035))
    assert costs.of_drafting(20, 3) == pytest.approx((0.025 + 0.075) / 2)
    bare = dataclasses.replace(costs, drafting=((8, 3, 0.025),))
    assert bare.of_drafting(8, 0) == 0.01  # not measured: as without a draft


def test_costs_are_data():
    costs = planted(0.5, start=1.0)
    assert Costs.from_json(json.loads(json.dumps(dataclasses.asdict(costs)))) == costs


def test_the_reason_is_one_line():
    for slope in (0, 0.2, 1):
        said = reason(choose_schedule(planted(slope), GOOD, LENGTHS), planted(slope), GOOD)
        assert "\n" not in said and "80% 65% 50%" in said
    assert said.startswith("no draft: drafts do not pay")
