"""What `equal_runs` makes of two runs' records."""

import pytest

from benchmarks import equal_runs


def record(step, seconds, compilations=0, answers=("a", "b")):
    return {"step": step, "reward": 0.5, "length": 2.0, "finished": 1.0, "tokens": 4,
            "acceptance_length": 1.5, "compilations": compilations, "answers": list(answers),
            "seconds/rollout": seconds, "seconds/update": 1.0, "seconds/compile": 0.5,
            "seconds/step": seconds + 1.0}  # the whole, compiling within it


def test_steps_that_compiled_do_not_count_and_answers_are_compared():
    ours = [record(1, 50.0, 3), record(2, 1.0), record(3, 2.0)]
    plain = [record(1, 70.0, 2), record(2, 2.0), record(3, 2.0, answers=("a", "c"))]
    rows = equal_runs.compared(ours, plain)
    assert [row["same"] for row in rows] == [True, True, False]
    found = equal_runs.summary(rows)
    assert (found["steps"], found["same"]) == (3, 2)
    assert found["rollout_speedup"] == pytest.approx(4 / 3)
    assert found["median_speedup"] == pytest.approx(1.5)
    assert found["step_speedup"] == pytest.approx(6 / 5)
