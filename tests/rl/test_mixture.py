"""Prompts of several sources."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from jspec.errors import InputError
from jspec.hub.tokenizer import character_tokenizer
from jspec.learning_sections import DataSection
from jspec.rl.mixture import load_mixture
from jspec.rl.prompts import PromptData

TOKENIZER = character_tokenizer("0123456789abcdef")


def source(path, texts, **more):
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1", **more}) + "\n"
                            for text in texts))
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Three times as many of the ten digits as of the six letters."""
    return DataSection(prompts_per_step=4, source={
        "digits": {"source": source(tmp_path / "d.jsonl", "0123456789"), "weight": 3},
        "letters": source(tmp_path / "l.jsonl", "abcdef", limit=2)})


def stream(data, steps):
    return [[prompt.text for prompt in step] for step in itertools.islice(data, steps)]


def test_a_step_has_prompts_of_every_source_that_say_where_they_are_from(data):
    prompts = [prompt for step in itertools.islice(PromptData(data, TOKENIZER, 0), 5)
               for prompt in step]
    names = [prompt.meta["source_name"] for prompt in prompts]
    assert [names[i:i + 4].count("digits") for i in range(0, 20, 4)] == [3] * 5
    assert all((prompt.text in "abcdef") == (prompt.meta == {"limit": 2, "source_name": "letters"})
               for prompt in prompts)
    digits = [prompt.text for prompt in prompts if prompt.text.isdigit()]
    assert sorted(digits[:10]) == list("0123456789") != digits[:10]


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_a_mixture_is_shared_and_resumed(data, steps):
    one = PromptData(data, TOKENIZER, 1)
    both = [PromptData(data, TOKENIZER, 1, index, 2) for index in range(2)]
    whole, halves = stream(one, steps), [stream(half, steps) for half in both]
    assert [left + right for left, right in zip(*halves, strict=True)] == whole
    assert both[0].state() == both[1].state() == one.state()
    state, rest = json.loads(json.dumps(one.state())), stream(one, 5)
    resumed = PromptData(data, TOKENIZER, 1)
    resumed.restore(state)
    assert stream(resumed, 5) == rest


def changed(data, **parts):
    return dataclasses.replace(data, source={**data.source, **parts})


def test_a_position_in_another_mixture_is_refused(data, tmp_path):
    made = PromptData(data, TOKENIZER, 1)
    stream(made, 2)
    for other in (changed(data, letters={"source": data.source["letters"], "weight": 2}),
                  changed(data, letters=source(tmp_path / "o.jsonl", "abcdee"))):
        with pytest.raises(InputError, match="belongs to other prompts"):
            PromptData(other, TOKENIZER, 1).restore(made.state())


def test_a_mixture_of_one_is_the_one_with_a_name(data):
    text = dataclasses.replace(data, source=data.source["letters"])
    alone = dataclasses.replace(data, source={"letters": data.source["letters"]})
    alone, text = (PromptData(config, TOKENIZER, 7) for config in (alone, text))
    assert next(text)[0].meta == {"limit": 2} != next(alone)[0].meta
    assert stream(alone, 6) == stream(text, 6)


def test_a_source_of_a_mixture_that_cannot_be_used_is_named(data, tmp_path):
    for part, message in [
        (source(tmp_path / "t.jsonl", "ab", source_name="x"),
         "t.jsonl:1: the key 'source_name' is taken: of several sources"),
        ({"source": source(tmp_path / "f.jsonl", "ab"), "weight": 12},
         r"data.prompts_per_step=4, of which its share is 4, is more than data.source.letters=.*f"
         r".jsonl has: 2; lower it"),
        (str(tmp_path / "gone.jsonl"), "gone.jsonl: No such file .*; check data.source.letters"),
        ({"source": source(tmp_path / "c.jsonl", "ab"), "prompt_column": "promt"},
         r"c.jsonl:1: no 'promt' .*did you mean 'prompt'\? data.source.letters.prompt_column"),
        ({"source": source(tmp_path / "c.jsonl", "ab"), "options": {"size": 1}},
         "data.source.letters.options are for reasoning_gym tasks; data.source.letters="),
        (source(tmp_path / "z.jsonl", ["a", "z"]), "z.jsonl:2: .*'z' is not in its alphabet")]:
        with pytest.raises(InputError, match=message):
            PromptData(changed(data, letters=part), TOKENIZER, 0)


def test_prompts_that_are_too_long_are_counted_by_source(data, tmp_path):
    long = source(tmp_path / "long.jsonl", ["aaaa", "b", "cccc", "d"])
    config = dataclasses.replace(changed(data, letters=long), max_prompt_tokens=2, too_long="skip")
    made = PromptData(config, TOKENIZER, 0)
    assert made.records.left_out == [0, 2] and made.left_out == 2
    assert {text for step in stream(made, 10) for text in step} == {*"0123456789bd"}


def test_every_source_holds_out_and_nothing_held_out_is_trained_on(data, tmp_path):
    both = changed(data, letters=source(tmp_path / "both.jsonl", "01234567abcdef"))
    config = dataclasses.replace(both, held_out=3)
    trained, held_out = ([record["prompt"] for record in load_mixture(config, TOKENIZER, 2,
                                                                     held_out=side)]
                         for side in (False, True))
    assert len(held_out) == 6 and not {*trained} & {*held_out}
    assert {*trained} | {*held_out} == {*"0123456789abcdef"}
    few = changed(data, letters=source(tmp_path / "few.jsonl", "012"),
                  digits=source(tmp_path / "more.jsonl", "210"))
    for held_out, message in ((3, "data.held_out=3 leaves nothing to train on: .*more.jsonl has 3"),
                              (2, "data.held_out leaves nothing of .*more.jsonl to train on: other "
                               "sources hold out")):
        with pytest.raises(InputError, match=message):
            load_mixture(dataclasses.replace(few, held_out=held_out), TOKENIZER, 0)


def test_the_answers_of_a_mixture_are_checked_by_source(data):
    seen = []

    def check(part):
        return None if part.name == "digits" else lambda answer: seen.append(part.source)

    PromptData(data, TOKENIZER, 0, answer_check=check)
    assert {*seen} == {data.source["letters"]}


def test_the_records_that_a_digest_is_of(data):
    mixture = load_mixture(data, TOKENIZER, 0)
    assert [mixture.part(number) for number in (0, 9, 10, 15)] == [0, 0, 1, 1]
    assert mixture.where(10).endswith("l.jsonl:1") and len(mixture) == 16
    assert mixture.digest(np.array([3, 12])) == mixture.digest([12, 3]) != mixture.digest([3, 13])
