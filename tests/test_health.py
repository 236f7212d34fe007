"""What is said of a step that taught nothing, and when a run ends for it."""

import types

import numpy as np
import pytest

from jspec.config import load_config
from jspec.health import SAME_STEPS, all_failed, never_taught, troubles

SOUND = {"skipped": 0, "skipped_in_row": 0, "draft_skipped": 0, "draft_skipped_in_row": 0,
         "draft_finite": True}


def found(learned=(), weights=1.0, draft=1.0, updates=8, rewardless="", in_row=0, *overrides):
    def side(value):
        return types.SimpleNamespace(weights={"w": np.array([0.5, value], np.float32)},
                                     adapters=None)

    state = types.SimpleNamespace(policy=side(weights), draft=side(draft),
                                  updates=np.int32(updates))
    return troubles(load_config(None, ["draft.path=some/draft", *overrides]), state,
                    SOUND | dict(learned), rewardless, in_row)


def test_a_sound_step_has_none():
    assert found() == []


def test_sound_weights_are_not_blamed_and_waited_for():
    (trouble,) = found({"skipped": 3, "skipped_in_row": 3})
    assert ("update skipped (3 in a row, 3 in all)" in str(trouble)
            and "not the learning rate" in str(trouble))
    assert not trouble.final and not trouble.lost
    (trouble,) = found({"skipped": 5, "skipped_in_row": 5})
    assert trouble.final and "grpo.max_skipped=5" in str(trouble)


@pytest.mark.parametrize("size", [1e30, float("inf"), float("nan")])
def test_weights_that_ran_away_end_the_run_at_once(size):
    (trouble,) = found({"skipped": 1, "skipped_in_row": 1}, weights=size)
    assert (trouble.final and trouble.lost
            and "lower grpo.learning_rate=1e-06 or grpo.clip=1" in str(trouble))
    (trouble,) = found({"skipped": 1, "skipped_in_row": 1}, weights=size, updates=1)
    # never was an update sound
    assert trouble.final and "as they come from smollm2-135m-instruct" in str(trouble)
    assert "learning_rate" not in str(trouble)


@pytest.mark.parametrize("learned",
                         [{"draft_skipped": 1, "draft_skipped_in_row": 1}, {"draft_finite": False}])
def test_a_draft_that_ran_away_is_named_and_stops_the_run_only_in_a_row(learned):
    (trouble,) = found(learned, draft=float("nan"))
    assert trouble.side == "draft" and trouble.lost and not trouble.final
    assert ("the draft" in str(trouble)
            and "lower draft.learning_rate=0.001 or draft.clip=1" in str(trouble))
    assert ("update skipped (1 in a row" in str(trouble)) == ("draft_skipped" in learned)
    (trouble,) = found({"draft_skipped": 9, "draft_skipped_in_row": 5}, draft=float("nan"))
    assert trouble.final


def test_what_the_last_update_did_to_the_policy_is_asked_of_its_weights():
    (trouble,) = found(weights=1e30)
    assert trouble.final and trouble.lost and "lower grpo.learning_rate=1e-06" in str(trouble)
    assert ("the policy's weights are of no use any more" in str(trouble)
            and "skipped" not in str(trouble))
    assert found() == []


def test_rewards_that_all_fail():
    why = all_failed(np.zeros(4), 4, "RuntimeError: no")
    assert why == "the reward failed for every one of the step's 4 answers (RuntimeError: no)"
    assert all_failed(np.zeros(4), 3) == ""
    (trouble,) = found(rewardless=why, in_row=1)
    assert not trouble.final and "not at the learning rate" in str(trouble)
    (trouble,) = found(rewardless=why, in_row=5)
    assert trouble.final and "5 steps in a row" in str(trouble)


def test_rewards_that_never_vary_are_named_once():
    same = [{"reward": 1.0, "reward_differs": 0.0, "reward_failures": 0}] * (SAME_STEPS + 1)
    told = [bool(never_taught(same[:steps])) for steps in range(SAME_STEPS + 2)]
    assert told == [steps == SAME_STEPS for steps in range(SAME_STEPS + 2)]
    assert ("every answer of the first 5 steps has the reward 1, and"
            in never_taught(same[:SAME_STEPS]))
    # what fails is said elsewhere
    for change in ({"reward_differs": 0.1}, {"reward_failures": 16}):
        assert not never_taught([*same[:3], {**same[0], **change}, same[0]])
    cut = [{"reward": 0.1 * i, "reward_differs": 1.0, "reward_failures": 0, "trained_tokens": 0.0}
           for i in range(SAME_STEPS)]
    assert "no answer of the first 5 steps ended before the cap, and" in never_taught(cut)
    assert not never_taught([*cut[1:], {**cut[0], "trained_tokens": 3.0}])
    by_prompt = [*same[:3], {**same[0], "reward": 0.5}, same[0]]
    assert ("in the first 5 steps all answers to a prompt have one reward, and"
            in never_taught(by_prompt))
