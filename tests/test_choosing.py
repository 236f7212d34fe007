"""What a run drafts by itself: planted costs decide, what is known goes into checkpoints, measured
costs are kept."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jspec
from jspec import choosing, cycle_costs
from jspec.choosing import LOOK_AGAIN, Chooser, Plan, missing, spread
from jspec.errors import InputError
from jspec.speculate import Batching, Sampling, Speculation
from jspec.speculate.results import RolloutStats
from jspec.speculate.schedule import Costs
from tests.speculate.tiny import policy, table_draft

FREE = Costs((4,), 1, ((4, 0.01),), ((4, 1, 0.01), (4, 2, 0.01), (4, 3, 0.01), (4, 4, 0.1)))


def shown(drafted, accepted, lengths=(3, 4)):
    return RolloutStats(np.ones(2), np.array(drafted), np.array(accepted)), np.array(lengths)


def test_what_rollouts_show_is_remembered():
    plan = Plan().after(*shown([100, 80, 5], [60, 20, 5]))
    assert plan.lengths == (3, 4) and plan.acceptance == (0.3, 0.125)  # five drafts say nothing
    plan = plan.after(*shown([100], [70]))
    assert plan.acceptance == pytest.approx((0.5, 0.125))
    assert plan.after(*shown([], [])).acceptance == plan.acceptance
    plan = dataclasses.replace(plan, k=((4, 2),), costs=FREE, look=3)
    assert Plan.from_json(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan
    assert Plan.from_json(json.loads(json.dumps(dataclasses.asdict(Plan())))) == Plan()


def test_only_what_a_schedule_rests_on_is_measured():
    costs = dataclasses.replace(FREE, rows=(32, 16, 8), drafting=((32, 3, 1.0), (8, 3, 1.0)))
    assert missing(0, costs) == []
    assert missing(((8, 3), (16, 3), (32, 3)), costs) == []
    assert missing(((8, 5), (16, 3), (32, 0)), costs) == [(8, 5), (32, 0)]
    assert missing(((8, 3), (16, 2), (32, 3)), costs) == [(8, 2), (32, 2)]


def test_lengths_to_begin_with_are_spread_up_to_the_cap():
    assert (sorted(spread(4, 100)) == [25, 50, 75, 100] and max(spread(7, 3))
            == 3 and min(spread(7, 3)) == 1)


def test_it_is_looked_again_ever_less_often_while_nothing_is_drafted(monkeypatch):
    looked, said = [], []
    monkeypatch.setattr(choosing, "prompts_of", lambda subject: None)
    monkeypatch.setattr(choosing, "accepted",
                        lambda subject, prompts: looked.append(step) or acceptance)
    monkeypatch.setattr(choosing, "kept", lambda subject: FREE)
    chooser = Chooser(Sampling(max_new_tokens=64), Speculation(), Batching(), 1000, said.append)
    of = policy(), table_draft(policy()), jspec.PromptBatch.from_tokens([[1, 2]], group_size=4,
                                                                        seed=0)
    plan, acceptance = Plan(), (0.0, 0.0, 0.0)
    for step in range(150):
        acceptance = (0.9, 0.8, 0.7) if step == 7 * LOOK_AGAIN else acceptance
        plan = chooser.before(plan, step, *of)
        assert plan.k == (0 if step < 7 * LOOK_AGAIN else ((4, 3),))
    assert looked == [0, LOOK_AGAIN, 3 * LOOK_AGAIN, 7 * LOOK_AGAIN]
    assert [line.partition(":")[0] for line in said] == ["no draft", "k = 3"]


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JSPEC_CACHE", str(tmp_path))
    model = jspec.reshard(policy())
    of = model, table_draft(policy()), jspec.PromptBatch.from_tokens([[1, 2]] * 2, group_size=1,
                                                                     seed=0)
    sampling = Sampling(max_new_tokens=8)
    monkeypatch.setattr(choosing, "missing", lambda *_: [])  # or it might be asked for more points
    chosen = jspec.choose_k(*of, sampling=sampling)
    assert chosen == 0 or [rows for rows, _ in chosen] == [2]
    (path,) = (tmp_path / "costs").iterdir()
    costs = Costs.from_json(json.loads(path.read_text())["costs"])
    assert (costs.rows == (2,) and costs.shards
            == 1 and all(s > 0 for *_, s in (*costs.plain, *costs.drafting)))
    monkeypatch.setattr(choosing, "measured", lambda *_: pytest.fail("it was kept"))
    jspec.choose_k(*of, sampling=sampling, lengths=[8, 2])
    path.write_text("{")
    with pytest.raises(pytest.fail.Exception):  # damaged: measured anew
        jspec.choose_k(*of, sampling=sampling)
    with pytest.raises(InputError, match="one for each of the 2 sequences, and are 1"):
        jspec.choose_k(*of, sampling=sampling, lengths=[8])
    with pytest.raises(InputError, match="draft"):
        jspec.choose_k(model, None, of[2])


def test_a_cycle_is_what_more_of_them_take_longer():
    assert cycle_costs._split(0.3, 1, 1.1, 9) == pytest.approx((0.1, 0.2))
    # noise, and nothing that could be said to cost nothing
    cycle, rest = cycle_costs._split(0.011, 1, 0.010, 8)
    assert cycle == pytest.approx(0.1 * 0.010 / 8) and rest > 0


def test_what_is_accepted_is_asked_under_other_noise_than_that_which_judges():
    batch = jspec.PromptBatch.from_tokens([[1, 2]], group_size=2, seed=0)
    subject = cycle_costs.Subject.of(policy(), table_draft(policy()), batch, Sampling(),
                                     Speculation(), Batching())
    assert not np.array_equal(*map(jax.random.key_data, (subject.batch.key, batch.key)))
