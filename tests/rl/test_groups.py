"""Which groups of two rollouts go on, and that each takes all that is its own with it."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np

import jspec
from jspec.config import load_config
from jspec.model import ModelConfig, init_policy
from jspec.refill import Refill
from jspec.rl import groups
from jspec.rl.grading import Grades
from jspec.step import for_host, to_learn_from
from jspec.step_record import dropped


def test_groups_with_a_spread_come_first_and_all_stay_in_order():
    for flags in itertools.product((False, True), repeat=6):
        index = groups.kept(np.array(flags[:3]), np.array(flags[3:]))
        wanted = [i for i in range(6) if flags[i]] + [i for i in range(6) if not flags[i]]
        assert index.tolist() == sorted(wanted[:3])


def test_of_every_shard_go_on_the_first_that_are_done():
    def kept(done, groups, shards=1):
        rows = np.repeat(np.array(done, bool), 2)
        rows[1::2] &= np.array(done) != 0.5  # half of such a group
        out = SimpleNamespace(lengths=np.arange(len(rows)), done=rows)
        drawn = groups_of(out, len(done), groups, shards)
        assert drawn.lengths.shape == drawn.done.shape == (len(done), 2)
        return drawn.kept.tolist()

    groups_of = groups.Drawn.of
    assert kept([1, 0.5, 1, 1, 0, 1], 3) == [0, 2, 3]
    assert kept([0, 0, 1, 0.5, 1, 1], 3) == [2, 4, 5]
    assert kept([1, 1, 1, 0, 0, 1], 2, 2) == [0, 5] and kept([1, 1, 0, 1, 1, 1], 4, 2) == [0, 1, 3,
                                                                                          4]
    assert kept([1, 1, 1], None) == [0, 1, 2]


def test_what_over_sampling_leaves_off_is_said():
    lengths, done = np.array([[9, 2], [3, 1], [4, 2]]), np.array([[0, 1], [1, 1], [1, 1]], bool)
    one = groups.Drawn(lengths, done, np.array([1, 2]))
    said = dropped([one, one])
    assert said == {"groups_dropped": 2, "length_dropped": 5.5, "length_kept": 2.5,
                    "dropped_unfinished": 0.5}
    assert dropped([one._replace(kept=np.arange(3))]) == {}
    waited = one._replace(lengths=np.array([[9, 0], [3, 1], [4, 2]]))  # half of it, in slots
    assert dropped([waited])["length_dropped"] == 9
    assert dropped([one._replace(lengths=lengths * [[0], [1], [1]])])["length_dropped"] is None


def test_rows_go_with_their_groups():
    policy = init_policy(ModelConfig(vocab_size=23, hidden_size=16, intermediate_size=16,
                                     num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8), 0)
    sampling = jspec.Sampling(max_new_tokens=4, top_p=0.9)
    batches = [jspec.PromptBatch.from_tokens([[1, 2, 3], [4 + i]], group_size=3, seed=0)
               for i in range(2)]
    batches[1] = groups.numbered(batches[1], 1)
    assert batches[1].sequence_ids.tolist() == list(range(6, 12))
    outs = [jspec.rollout(policy, None, batch, sampling=sampling) for batch in batches]
    index = np.array([1, 2], np.int32)
    prompts, out = jax.jit(groups.merged)(
        *((batch, to_learn_from(out)) for batch, out in zip(batches, outs, strict=True)), index)
    hosts = [jax.device_get(for_host(out)) for out in outs]
    alone, one = jax.jit(groups.picked, static_argnums=3)(batches[1], to_learn_from(outs[1]),
                                                          np.array([1], np.int32), 1)
    assert alone.tokens[:, 0].tolist() == [5] and alone.sequence_ids.tolist() == [9, 10, 11]
    picked = groups.picked_on_host(hosts[1], groups.Drawn(
        hosts[1].lengths.reshape(2, 3), hosts[1].done.reshape(2, 3), np.array([1])))
    assert picked.stats.cycles.tolist() == picked.lengths.tolist()
    for got in (one, picked.replace(stats=None)):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(hosts[1].replace(stats=None)),
                        strict=True):
            np.testing.assert_array_equal(x, y[3:])
    on_host = groups.merged_on_host(*hosts, index)
    assert prompts.sequence_ids.tolist() == [3, 4, 5, 6, 7, 8]
    assert prompts.tokens[:, 0].tolist() == [4, 1]
    rows = [np.concatenate([np.asarray(x)[3:], np.asarray(y)[:3]]) for x, y in zip(
        jax.tree.leaves(hosts[0].replace(stats=None)), jax.tree.leaves(hosts[1].replace(
            stats=None)), strict=True)]
    for got in (out, on_host.replace(stats=None)):
        for x, y in zip(jax.tree.leaves(got), rows, strict=True):
            np.testing.assert_array_equal(x, y)
    assert on_host.stats.loop_cycles.sum() == sum(host.stats.loop_cycles.sum() for host in hosts)
    assert on_host.stats.cycles.tolist() == on_host.lengths.tolist()


def refill(monkeypatch, rewards, most=4):
    """A Refill of two prompts a step and two answers each, whose rollouts get these rewards."""
    monkeypatch.setattr("jspec.refill.collate", lambda *_: SimpleNamespace())
    monkeypatch.setattr("jspec.refill.numbered", lambda batch, number: number)
    config = load_config(None, ["data.prompts_per_step=2", "data.group_size=2",
                                f"data.dynamic_sampling={most}"])
    class Data:
        trouble, numbers = None, itertools.count(2)

        def __next__(self):
            return [next(self.numbers), next(self.numbers)]

    graded = [Grades(np.float32(x), {"raised": 1}, "", {"a": np.float32(x)}, 1, 0) for x in rewards]
    data = Data()
    made = Refill(config, data, None, [0, 1], lambda prompts, out, drawn: graded[out])
    return made, graded, data


def taken(made, graded):
    """The grades that go on, and how many rollouts there were."""
    all_of_two = SimpleNamespace(kept=[0, 1])
    now, rollouts = made.first(0, all_of_two), 1
    while (more := made.further(now)) is not None:
        assert more.prompts == rollouts
        index, now = more.keep(now, more.grade(rollouts, all_of_two))
        assert len(index) == 2
        rollouts += 1
    return now, rollouts


def test_further_prompts_take_the_places_of_groups_without_a_spread(monkeypatch):
    made, graded, _ = refill(monkeypatch, [[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    now, rollouts = taken(made, graded)
    assert (rollouts, made.prompts, now.rewards.tolist()) == (3, [1, 4], [0, 1, 0, 1])
    assert (now.failed, now.failures) == (3, {"raised": 3})
    assert now.by_name["a"].tolist() == [0, 1, 0, 1]
    assert made.record() == {"groups_drawn": 6, "groups_without_spread": 3, "reward_drawn": 5 / 12}


def test_there_are_no_more_rollouts_than_are_allowed_or_can_be(monkeypatch):
    dull = [[1, 1, 1, 1]] * 4
    made, graded, _ = refill(monkeypatch, dull, most=3)
    assert taken(made, graded)[1] == 3 and made.prompts == [0, 1]
    made, graded, data = refill(monkeypatch, dull)
    data.trouble = "a prompt that cannot be used"
    assert taken(made, graded)[1] == 1
    made, graded, _ = refill(monkeypatch, dull, most=1)
    assert made.asked is None and made.record() == {}


def test_counts_stay_within_the_rows():
    a = Grades(np.zeros(4, np.float32), {}, "", failed=4, ungraded=4)
    b = dataclasses.replace(a, failed=0, ungraded=0)
    assert a.of_groups(b, np.arange(4)).ungraded == 0 and a.of_groups(a, np.arange(4)).ungraded == 4
