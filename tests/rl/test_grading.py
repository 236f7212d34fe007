"""Grading of a step by several processes."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jspec.hub.tokenizer import character_tokenizer
from jspec.rl.grading import Grades, grade, ungraded
from jspec.rl.prompts import Prompt
from jspec.rl.rewards import FAILURES, RewardResult

TOKENIZER = character_tokenizer("0123456789+=")
NONE = dict.fromkeys(FAILURES, 0)


class Pool:
    """Grades each answer by its text, another name not at all."""

    wants = ("messages",)

    def __init__(self, whole_groups):
        self.whole_groups, self.seen = whole_groups, []

    def grade(self, items):
        self.seen += [(item.group, item.messages[-1]["content"]) for item in items]
        values = np.array([float(item.response) for item in items], np.float32)
        return RewardResult(values, NONE | {"raised": 1}, {"raised": "no"},
                            {"a": values, "b": values * np.nan}, 2, 1)


@pytest.mark.parametrize("whole_groups, shares",
                         [(False, [(0, 1), (1, 2)]), (True, [(0, 1), (2,)])])
def test_each_process_grades_its_share_and_whole_groups_where_they_are_compared(
        monkeypatch, whole_groups, shares):
    lengths = np.ones(6, int)
    out = SimpleNamespace(tokens=np.array([TOKENIZER.encode(str(n)) for n in range(6)]),
                          mask=np.ones((6, 1), bool), lengths=lengths, finished=lengths == 0)
    prompts = [Prompt(text, (5,), "", {}, messages=()) for text in "abc"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        gathered = []  # what this process has to say, and the other nothing
        monkeypatch.setattr("jspec.rl.grading.multihost_utils.process_allgather",
                            lambda x, to=gathered: to.append(x) or np.stack([x, np.zeros_like(x)]))
        pool = Pool(whole_groups)
        graded = grade(pool, TOKENIZER, prompts, out)
        parts.append(graded)
        groups = sorted({group for group, _ in pool.seen})
        assert tuple(groups) == shares[index] and len(gathered) == 2
        assert graded.failures == NONE | {"raised": 1}
        assert (graded.failed, graded.ungraded) == (2, 1)
    np.testing.assert_array_equal(parts[0].rewards + parts[1].rewards, range(6))
    seen = [~np.isnan(part.by_name["b"]) for part in parts]  # of the rows that the other graded
    assert not np.any(seen[0] & seen[1]) and np.all(seen[0] | seen[1])


def test_functions_are_logged_each_by_its_name_where_there_are_several():
    a, b = np.float32([0, 1]), np.float32([np.nan, 3])
    both = Grades(a, NONE, "", {"a": a, "b": b, "c": a * np.nan}, 2, 1).record()
    assert both["reward_failures"] == 2 and ungraded(both) == 1
    assert {key: both[key] for key in both if not key.startswith("reward_failures")} == {
        "reward_ungraded": 1,
        "reward/a": 0.5, "reward_std/a": 0.5, "reward/b": 3.0, "reward_std/b": 0.0,
        "reward/c": None, "reward_std/c": None}
    alone = Grades(a, NONE | {"died": 1}, "", {"a": a}, 1, 1).record()
    assert alone == {"reward_failures": 1} | {
        f"reward_failures/{kind}": int(kind == "died") for kind in FAILURES}
    assert ungraded(alone) == 1
