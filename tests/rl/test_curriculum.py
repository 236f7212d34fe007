"""Prompts that come again by how often the run has solved them."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from jspec.config import load_config
from jspec.errors import InputError
from jspec.hub.tokenizer import character_tokenizer
from jspec.learning_sections import DataSection
from jspec.rl.curriculum import Curriculum, intervals, success_rates
from jspec.rl.order import Epochs
from jspec.rl.prompts import PromptData

ALPHABET = "".join(map(chr, range(65, 65 + 24)))
TOKENIZER = character_tokenizer(ALPHABET)


def test_after_how_many_passes_a_prompt_comes_again():
    rates = np.array([0, 1, 0.5, 0.25, 1 / 16, np.nan])
    np.testing.assert_allclose(intervals(rates, 4), [4, 4, 1, 4 / 3, 4, 1])
    np.testing.assert_allclose(intervals(rates, 8)[4], 256 / 60)
    assert (intervals(rates, 1) == 1).all()


def test_how_often_a_prompt_was_solved():
    rewards = np.float32([1, 0, -3, 1, 7, 0.5, 0, 0])
    np.testing.assert_array_equal(success_rates(rewards, None, 4), [0.5, 0.5, 0.75, 0])
    failed = np.array([0, 1, 0, 1, 0, 0, 1, 1], bool)
    np.testing.assert_array_equal(success_rates(rewards, failed, 4), [1, 0, 0.75, np.nan])


def walk(curriculum, steps, size, success):
    """The records of some steps, each told how often it was solved."""
    taken = []
    for _ in range(steps):
        numbers = np.array(curriculum.take(0, size))
        taken.append(numbers.tolist())
        curriculum.drew(numbers)
        curriculum.told(numbers, success(numbers))
    return taken


@pytest.mark.parametrize("success", [lambda numbers: np.full(len(numbers), 0.5),
                                     lambda numbers: np.full(len(numbers), np.nan)])
def test_prompts_that_are_all_middling_or_unknown_come_as_without_a_curriculum(success):
    epochs = Epochs(12, 3, 0, True)
    taken = walk(Curriculum(epochs, 8), 12, 4, success)
    assert sum(taken, []) == epochs.take(0, 48)


def test_what_differs_comes_again_sooner_and_nothing_is_forgotten():
    rates = np.array([0.0] * 10 + [1.0] * 10 + [0.5] * 10 + [0.25] * 10)
    epochs = Epochs(40, 3, 0, True)
    taken = sum(walk(Curriculum(epochs, 4), 500, 4, lambda numbers: rates[numbers]), [])
    assert taken[:40] == epochs.take(0, 40)  # the first pass is the first epoch
    often = np.bincount(taken, minlength=40).reshape(4, 10)
    # as 1 / 4 to 1 / 4 to 1 to 3 / 4, for all of a kind alike
    wanted = 2000 / 22.5 * np.array([0.25, 0.25, 1, 0.75])
    np.testing.assert_allclose(often, np.tile(wanted, (10, 1)).T, atol=1.5)


def test_the_rate_goes_by_what_was_before_too():
    curriculum = Curriculum(Epochs(2, 0, 0, False), 8)
    for rates, wanted in (([1, 0], [1, 0]), ([0, np.nan], [0.5, 0]), ([1, 1], [0.75, 0.5])):
        curriculum.drew([0, 1])
        curriculum.told([1, 0], np.array(rates[::-1], float))
        np.testing.assert_array_equal(curriculum.success, wanted)
    np.testing.assert_allclose(curriculum.passes, [8 + 1 + 4 / 3, 8 + 1 + 1])


def test_a_step_of_more_prompts_than_there_are_has_some_twice():
    assert Curriculum(Epochs(3, 0, 0, False), 8).take(0, 5) == [0, 1, 2, 0, 1]


@pytest.fixture
def data(tmp_path):
    for name, letters in (("a", ALPHABET[:16]), ("b", ALPHABET[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"prompt": letter, "answer": ""}) + "\n" for letter in letters))
    return DataSection(prompts_per_step=4, curriculum=True, source={
        "a": {"source": f"{tmp_path}/a.jsonl", "weight": 3}, "b": f"{tmp_path}/b.jsonl"})


def rate(prompt):
    """One that a prompt has whenever it is asked: a third of them each never, always and middling.
    Of some letters it is not known."""
    return np.nan if prompt.text in "EQ" else (ord(prompt.text) % 3) / 2


def steps_of(data, count):
    seen = []
    for _ in range(count):
        prompts = next(data)
        data.solved(range(len(prompts)), np.array([rate(prompt) for prompt in prompts]))
        seen.append([prompt.text for prompt in prompts])
    return seen


@pytest.mark.parametrize("done", [1, 7, 30])
def test_a_curriculum_resumes_to_what_it_would_have_been(data, done):
    whole = PromptData(data, TOKENIZER, 5)
    seen = steps_of(whole, done)
    state = json.loads(json.dumps(whole.state()))
    rest = steps_of(whole, 20)
    resumed = PromptData(data, TOKENIZER, 5)
    resumed.restore(state)
    assert steps_of(resumed, 20) == rest and resumed.state() == whole.state()
    shares = [sum(text in ALPHABET[:16] for text in step) for step in seen + rest]
    assert shares == [3] * len(shares)  # each source has its share, whatever is hard


def test_what_a_curriculum_remembers_has_an_effect(data):
    often = Counter(text for step in steps_of(PromptData(data, TOKENIZER, 5), 200) for text in step)
    middling, others = ([often[letter] for letter in ALPHABET[:16] if letter != "E"
                         and (ord(letter) % 3 == 1) == side] for side in (True, False))
    assert min(middling) > 7 * max(others) > 0 and often["E"] > 7 * max(others)
    plain = PromptData(dataclasses.replace(data, curriculum=False), TOKENIZER, 5)
    assert sum(steps_of(PromptData(data, TOKENIZER, 5), 4), []) == sum(steps_of(plain, 4), [])


def test_processes_share_a_curriculum(data):
    one = PromptData(data, TOKENIZER, 1)
    both = [PromptData(data, TOKENIZER, 1, index, 2) for index in range(2)]
    for _ in range(12):
        prompts = next(one)
        assert [prompt.text for half in both for prompt in next(half)] == [
            prompt.text for prompt in prompts]
        for data_of_one in (one, *both):
            data_of_one.solved(range(len(prompts)), np.array([rate(x) for x in prompts]))
    assert both[0].state() == both[1].state() == one.state()


def test_the_share_of_prompts_by_difficulty(data):
    made = PromptData(data, TOKENIZER, 5)
    shares = made.curriculum.difficulties()
    assert list(shares.values()) == [1, 0, 0, 0, 0, 0]
    next(made)
    made.solved([2, 0, 3], np.array([0.5, 0, 0.2]))  # the other one was dropped
    shares = made.curriculum.difficulties()
    assert shares == {"curriculum/unseen": 21 / 24, "curriculum/never": 1 / 24,
                      "curriculum/hard": 1 / 24, "curriculum/middling": 1 / 24,
                      "curriculum/easy": 0, "curriculum/always": 0}


def test_a_place_in_a_curriculum_that_is_none(data):
    made = PromptData(data, TOKENIZER, 5)
    steps_of(made, 3)
    state = made.state()
    for places in (None, {"99": [1.0, None]}, {"1": [1.0]}, {"1": [0, None]}, {"1": [1.0, 2]},
                   {"x": [1.0, None]}, {"1": ["1", None]}):
        with pytest.raises(InputError, match="data position is none; move that checkpoint away"):
            PromptData(data, TOKENIZER, 5).restore({**state, "curriculum": places})
    other = dataclasses.replace(data, curriculum_rest=3.0)
    for changed in (other, dataclasses.replace(data, curriculum=False)):
        with pytest.raises(InputError, match="belongs to other prompts .*data.curriculum"):
            PromptData(changed, TOKENIZER, 5).restore(state)


def test_a_rest_without_a_curriculum_is_one_line():
    with pytest.raises(InputError, match="data.curriculum_rest is of a curriculum, and there"):
        load_config(None, ["data.curriculum_rest=3"])
