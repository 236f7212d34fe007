import dataclasses
import functools
import itertools
import json
import re
import threading

import numpy as np
import pytest

from jspec.errors import InputError
from jspec.hub.tokenizer import character_tokenizer
from jspec.learning_sections import DataSection
from jspec.rl.prompts import PromptData
from jspec.rl.records import JsonLines


class Characters:
    """A tokenizer of one token a character, without a chat template."""

    def __call__(self, texts, add_special_tokens=True):
        begin = [1] if add_special_tokens else []
        return {"input_ids": [begin + [ord(character) for character in text] for text in texts]}


def section(path, **changes):
    return dataclasses.replace(DataSection(source=str(path), prompts_per_step=4), **changes)


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "answer": n, "half": n / 2}) + "\n"
                            for n in range(10)))
    return path


def texts(data, steps):
    return [[prompt.text for prompt in step] for step in itertools.islice(data, steps)]


def test_a_prompt_has_text_tokens_answer_and_the_rest(numbers):
    data = PromptData(section(numbers, shuffle=False), Characters(), seed=0)
    prompt = next(data)[3]
    assert ((prompt.text, prompt.tokens, prompt.answer, prompt.meta)
            == ("3", (1, ord("3")), "3", {"half": 1.5}))


def test_prompts_that_are_too_long_are_left_out_where_they_may_be(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n) * (1 + n), "answer": "a"}) + "\n"
                            for n in range(10)))
    asked = section(path, shuffle=False, max_prompt_tokens=7, prompts_per_step=2)
    with pytest.raises(InputError, match="over data.max_prompt_tokens=7"):
        PromptData(asked, Characters(), seed=0)
    data = PromptData(dataclasses.replace(asked, too_long="skip"), Characters(), seed=0)
    assert data.left_out == 4
    assert texts(data, 4) == [["0", "11"], ["222", "3333"], ["44444", "555555"], ["0", "11"]]
    with pytest.raises(InputError, match="all 10 prompts of .* are over data.max_prompt_tokens=1"):
        PromptData(section(path, max_prompt_tokens=1, too_long="skip"), Characters(), seed=0)


def test_without_shuffling_the_files_order_repeats(numbers):
    assert texts(PromptData(section(numbers, shuffle=False), Characters(), seed=0), 3) == [
        list("0123"), list("4567"), list("8901")
    ]


def test_steps_of_one_prompt(numbers):
    assert (texts(PromptData(section(numbers, shuffle=False, prompts_per_step=1), Characters(),
                             seed=0), 11) == [
                                 [text] for text in "01234567890"
                             ])


def test_shuffled_epochs_hold_every_prompt_once_and_differ(numbers):
    stream = sum(texts(PromptData(section(numbers), Characters(), seed=0), 5), [])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list("0123456789")
    assert stream[:10] != stream[10:]


def test_the_seed_decides_the_order(numbers):
    first, again, other = (PromptData(section(numbers), Characters(), seed=seed)
                           for seed in (7, 7, 8))
    one, two, three = texts(first, 8), texts(again, 8), texts(other, 8)
    assert one == two != three
    flat, late = sum(one, []), sum(three, [])
    assert flat[10:20] != late[:10]  # run 8 is not run 7 one epoch later


@pytest.mark.parametrize("changes, seed, drawn, order, digest", [
    ({}, 3, ["9602", "1475", "3841", "2850", "7963"], "f9ee8f251c218ed6", "ea26de0e2cede286"),
    ({"held_out": 3}, 2**40, ["0935", "2819", "0813", "2598", "1025"], "259187e4a0a34676",
     "f6f7ea0184fc5025"),
    ({"shuffle": False}, 0, ["0123", "4567", "8901", "2345", "6789"], "8cd9dc6474259ea8",
     "a7b167a0388f4036")])
def test_a_checkpoint_of_an_earlier_jspec_still_says_where_it_is(numbers, changes, seed, drawn,
                                                                 order, digest):
    data = PromptData(section(numbers, **changes), Characters(), seed)
    assert ["".join(step) for step in texts(data, 5)] == drawn
    assert data.state() == {"order": order, "drawn": digest, "steps": 5}


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_restored_equals_uninterrupted(numbers, steps):
    data = PromptData(section(numbers), Characters(), seed=3)
    texts(data, steps)
    state = json.loads(json.dumps(data.state()))
    rest = texts(data, 6)
    resumed = PromptData(section(numbers), Characters(), seed=3)
    texts(resumed, 2)  # where it stood before does not matter
    resumed.restore(state)
    assert texts(resumed, 6) == rest


def test_a_prompt_that_comes_again_knows_how_long_its_answers_were(numbers):
    def expected(data, steps):
        return [[prompt.expected_length for prompt in step]
                for step in itertools.islice(data, steps)]

    data = PromptData(section(numbers, shuffle=False), Characters(), seed=0)
    assert expected(data, 1) == [[None] * 4]
    data.answered(range(4), [1.4, 20, 3, 4])
    assert expected(data, 1) == [[None] * 4]
    data.answered([3, 0, 2], np.array([8, 5, 7], np.float32))  # of the other nothing is known
    state = json.loads(json.dumps(data.state()))
    rest = expected(data, 2)
    assert rest == [[None, None, 1, 20], [3, 4, 5, None]]
    resumed = PromptData(section(numbers, shuffle=False), Characters(), seed=0)
    resumed.restore(state)
    assert expected(resumed, 2) == rest and resumed.state() == data.state()


@pytest.mark.parametrize(
    "seed, changes, line",
    [
        (4, {}, ""),
        (3, {"prompts_per_step": 2}, ""),
        (3, {"shuffle": False}, ""),
        (3, {}, '{"prompt": "10", "answer": "10"}'),
    ],
)
def test_a_position_in_other_prompts_is_refused(numbers, seed, changes, line):
    state = PromptData(section(numbers), Characters(), seed=3).state()
    numbers.write_text(numbers.read_text() + line)
    data = PromptData(section(numbers, **changes), Characters(), seed)
    with pytest.raises(InputError,
                       match="data position belongs to other prompts .* choose another output_dir"):
        data.restore(state)


def test_processes_share_each_step_and_resume_in_another_number(numbers):
    one = PromptData(section(numbers), Characters(), seed=1)
    both = [PromptData(section(numbers), Characters(), 1, index, 2) for index in range(2)]
    whole, halves = texts(one, 6), [texts(half, 6) for half in both]
    assert [left + right for left, right in zip(*halves, strict=True)] == whole
    assert both[0].state() == both[1].state() == one.state()
    ids = [half.sequence_ids(group_size=3) for half in both]
    np.testing.assert_array_equal(np.concatenate(ids), one.sequence_ids(3))
    np.testing.assert_array_equal(one.sequence_ids(3), np.arange(12))
    assert ids[0].dtype == np.int32


def test_steps_that_the_processes_cannot_share(numbers):
    with pytest.raises(InputError, match="prompts_per_step=4 cannot be shared by 3 processes; make "
                       "it a multiple of 3"):
        PromptData(section(numbers), Characters(), 0, 0, 3)


def test_a_prompt_over_the_limit_is_named_at_once(tmp_path):
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": "short", "answer": ""}] * 50 + [{"prompt": "x" * 100, "answer": ""}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=r"the prompt 'x{57}\.\.\.' has 101 tokens, over "
                       r"data.max_prompt_tokens=100"):
        PromptData(section(path, max_prompt_tokens=100), Characters(), seed=0)
    assert PromptData(section(path, max_prompt_tokens=101), Characters(), seed=0)


class Bytes:
    """A tokenizer of one token a byte that drops tildes."""

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [list(text.replace("~", "").encode()) for text in texts]}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    "bad, message",
    [
        ("ééééé", r"long.jsonl:7: the prompt 'ééééé' has 10 tokens, over data.max_prompt_tokens=9; "
         r"shorten it"), ("~", r"long.jsonl:7: the prompt '~' has no tokens"),
    ],
)
def test_every_prompt_is_looked_at(tmp_path, monkeypatch, bad, message, background):
    """Before the first step, or, of many, behind it."""
    path = tmp_path / "long.jsonl"
    texts = ["abcdef"] * 6 + [bad] + ["g"] * 9
    path.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n" for text in texts))
    make = functools.partial(PromptData, section(path, max_prompt_tokens=9, shuffle=False), Bytes(),
                             seed=0)
    if not background:
        with pytest.raises(InputError, match=message):
            make()
        return
    monkeypatch.setattr(JsonLines, "at_once", 5)
    data = make()
    [thread.join() for thread in threading.enumerate() if thread.name == "prompts"]
    assert re.search(message, str(data.trouble))
    assert [prompt.text for prompt in next(data)] == ["abcdef"] * 4
    with pytest.raises(InputError, match=message):
        next(data)
    assert data.state()["steps"] == 1


def test_a_bad_prompt_is_known_a_step_ahead(tmp_path, monkeypatch):
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n"
                            for text in "abcdefgh~ijk"))
    monkeypatch.setattr(JsonLines, "at_once", 0)
    monkeypatch.setattr(PromptData, "look_on", lambda self, numbers: None)
    data = PromptData(section(path, shuffle=False), Bytes(), seed=0)
    next(data)
    assert data.trouble is None
    next(data)
    assert str(data.trouble) == f"{path}:9: the prompt '~' has no tokens"
    again = PromptData(section(path, shuffle=False), Bytes(), seed=0)
    again.restore(data.state())
    assert str(again.trouble) == str(data.trouble)


def test_a_prompt_that_the_tokenizer_refuses(numbers):
    with pytest.raises(InputError, match="numbers.jsonl:4: the tokenizer cannot encode the prompt "
                       "'3': '3' is not in its alphabet '012'"):
        PromptData(section(numbers), character_tokenizer("012"), seed=0)


def test_a_step_wants_more_prompts_than_there_are(numbers):
    with pytest.raises(InputError, match="data.prompts_per_step x data.over_sampling=4 x 2.6 = 11 "
                                         "is more than data.source=.* has: 10; lower it"):
        PromptData(section(numbers, over_sampling=2.6), Characters(), seed=0)
    with pytest.raises(InputError, match="data.prompts_per_step=11 is more than data.source=.* "
                       "has: 10; lower it"):
        PromptData(section(numbers, prompts_per_step=11), Characters(), seed=0)
    with pytest.raises(InputError, match="prompts_per_step=4 is more than .* has: 3 beside the "
                       "7 of data.held_out"):
        PromptData(section(numbers, held_out=7), Characters(), seed=0)


def test_held_out_prompts_are_drawn_only_where_they_are_asked_for(numbers):
    config = section(numbers, held_out=4, prompts_per_step=2)
    training, evaluation = (sum(texts(PromptData(config, Characters(), 0, held_out=side), 6), [])
                            for side in (0, 1))
    assert (len(set(training)) == 6 and len(set(evaluation[:4]))
            == 4 and not {*training} & {*evaluation})


def test_a_line_that_no_step_has_had_may_be_mended(numbers):
    """What stops a run over a prompt is no reason to begin anew."""
    data = PromptData(section(numbers, shuffle=False), Characters(), seed=0)
    next(data)
    state = data.state()
    lines = numbers.read_text().splitlines()
    numbers.write_text("\n".join([*lines[:9], lines[9].replace("9", "8")]))
    data = PromptData(section(numbers, shuffle=False), Characters(), seed=0)
    data.restore(state)
    assert texts(data, 2) == [list("4567"), list("8801")]
    numbers.write_text("\n".join([lines[1], *lines[1:]]))
    with pytest.raises(InputError, match="belongs to other prompts"):
        PromptData(section(numbers, shuffle=False), Characters(), seed=0).restore(state)


@pytest.mark.parametrize("state", [None, [], {}, {"steps": -1}, {"steps": "1"}, {"steps": 10**30},
                                   {"steps": 0, "expected": {"a": 1}},
                                   {"steps": 0, "expected": {"1": "x"}}])
def test_a_position_that_is_none(numbers, state):
    with pytest.raises(InputError, match="data position is none; move that checkpoint away"):
        PromptData(section(numbers), Characters(), seed=0).restore(state)
