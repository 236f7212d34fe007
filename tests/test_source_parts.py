"""What `data.source` and `evaluation.sources` name, and what they may not."""

import dataclasses
from fractions import Fraction

import pytest

from jspec.config import load_config
from jspec.errors import InputError
from jspec.learning_sections import DataSection, EvaluationSection
from jspec.prepare import check_rewards
from jspec.reward_parts import grading
from jspec.source_parts import evaluated, in_short, source_parts

MIXED = {"sums": "arithmetic", "math": {"source": "m.jsonl", "weight": 0.1,
                                        "prompt_column": "question"},
         "gym": {"source": "reasoning_gym:chain_sum", "weight": 2, "options": {"size": 9}},
         "off": {"source": "nowhere.jsonl", "weight": 0}}


def test_a_text_is_one_source_and_a_mapping_several_by_name():
    data = DataSection(source="m.jsonl", split="test", options={"size": 1})
    (part,) = source_parts(data)
    assert (part.name, part.data, part.label) == ("", data, "data.source=m.jsonl")
    sums, math, gym = source_parts(DataSection(source=MIXED, answer_column=None))
    assert [part.weight for part in (sums, math, gym)] == [1, Fraction(1, 10), 2]
    assert [part.number for part in (sums, math, gym)] == [0, 1, 2]
    assert (math.data.source, math.data.prompt_column, math.data.answer_column,
            math.label) == ("m.jsonl", "question", None, "data.source.math=m.jsonl")
    assert gym.data.options == {"size": 9} and not math.data.options
    assert in_short(MIXED) == "sums, math, gym, off"


@pytest.mark.parametrize("overrides, message", [
    (["data.source={}"], "'data.source' must be text or a mapping"),
    (["data.source={a b: arithmetic}"], "data.source has the name 'a b'; it names metrics"),
    (["data.source={a: 1}"], "data.source.a must be a source of prompts, or a mapping such as "
     r"\{source: my.jsonl, weight: 0.5\}, not 1"),
    (["data.source={a: {weight: 1}}"], "data.source.a must be a source of prompts"),
    (["data.source={a: {sorce: arithmetic}}"], "data.source.a has no 'sorce'; its keys are source"),
    (["data.source={a: {source: arithmetic, wieght: 1}}"],
     "data.source.a has no 'wieght'; its keys are source, weight, split, prompt_column, "),
    (["data.source={a: {source: arithmetic, weight: -1}}"],
     "data.source.a.weight must be a number, at least 0, that float32 holds, not -1"),
    (["data.source={a: {source: arithmetic, weight: true}}"], "data.source.a.weight must be a "),
    (["data.source={a: {source: arithmetic, weight: 0}}"],
     "data.source: the weights are all 0, and no prompt would ever be drawn; give one"),
    (["data.source={a: {source: arithmetic, options: 3}}"], "data.source.a.options must be a map"),
    (["data.source={a: {source: arithmetic, prompt_column: null}}"],
     "data.source.a.prompt_column must be text, not None"),
    (["data.source={a: arithmetic}", "data.split=train"],
     "data.split is of one source, and data.source has several by name; set it of each one that "
     "needs it, as data.source.NAME.split"),
    (["data.source={a: arithmetic}", "data.options={size: 3}"], "data.options is of one source"),
    (["evaluation.sources={a: {source: arithmetic, weight: 2}}"],
     "evaluation.sources.a has no 'weight'; its keys are source, split, "),
])
def test_what_no_source_can_be_is_one_line(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)


def test_one_source_of_several_is_changed_on_the_command_line():
    config = load_config(None, [("data.source", MIXED), "data.source.math.weight=0"])
    assert [part.name for part in source_parts(config.data)] == ["sums", "gym"]
    assert load_config(None, [("data.source", MIXED), "data.source=a.jsonl"]).data.source == (
        "a.jsonl")


def test_what_an_evaluation_asks():
    data = DataSection(source="a.jsonl", options={"size": 9}, held_out=4)
    of = evaluated(data, EvaluationSection())
    assert of == {"": dataclasses.replace(data, prompts_per_step=1)}
    several = evaluated(data, EvaluationSection(sources=("b.jsonl", "a.jsonl")))
    assert list(several) == ["b", "a"] and all(not one.held_out for one in several.values())
    assert [one.options for one in several.values()] == [{}, {"size": 9}]
    assert [one.source for one in several.values()] == ["b.jsonl", "a.jsonl"]


def test_an_evaluation_of_a_mixture_has_its_names():
    data = DataSection(source=MIXED, held_out=4)
    of = evaluated(data, EvaluationSection())
    assert list(of) == ["sums", "math", "gym"]
    (part,) = source_parts(of["math"])
    assert (part.name, part.data.source, part.data.prompt_column, part.data.held_out) == (
        "math", "m.jsonl", "question", 4)
    named = evaluated(data, EvaluationSection(sources={"math": {"source": "t.jsonl"},
                                                       "sums": "m.jsonl"}))
    (math,), (sums,) = map(source_parts, named.values())
    assert (math.name, math.data.prompt_column, math.data.held_out) == ("math", "prompt", 0)
    # read as training reads the same file
    assert (sums.name, sums.data.prompt_column) == ("sums", "question")
    (alone,) = evaluated(DataSection(), EvaluationSection(sources={"test": "t.jsonl"})).items()
    assert alone[0] == "" and source_parts(alone[1])[0].name == "test"
    (part,) = source_parts(evaluated(data, EvaluationSection(sources=("t.jsonl",)))[""])
    assert part.name == "t"


def test_every_source_is_graded():
    functions = {"math": {"function": "math_verify", "sources": ["math", "sums"]},
                 "gym": {"function": "reasoning_gym", "sources": ["gym"]}, "brief": "soft_overlong"}
    assert list(grading(functions, "math")) == ["math", "brief"]
    assert list(grading(functions, "gym")) == ["gym", "brief"] and grading("m.py:f", "") == "m.py:f"
    del functions["brief"]
    with pytest.raises(InputError, match="no function with a weight grades the source 'off' of "
                       "data.source; name it under the sources of one"):
        grading(functions, "off")
    with pytest.raises(InputError, match="grades data.source, whose prompts have no source by na"):
        grading(functions, "")
    asked = [("data.source", MIXED), ("reward.function", functions)]
    check_rewards(load_config(None, asked), DataSection(source={"math": "m.jsonl"}))
    with pytest.raises(InputError, match="reasoning_gym grades only its own tasks"):
        check_rewards(load_config(None, asked), DataSection(source={"gym": "m.jsonl"}))
    functions["gym"]["sources"] = ["gim"]
    with pytest.raises(InputError, match="reward.function.gym.sources has 'gim', and data.source "
                       "names 'sums', 'math', 'gym', 'off'; did you mean 'gym'"):
        load_config(None, asked)
    functions["gym"]["sources"] = "gym"
    with pytest.raises(InputError, match="gym.sources must be a list of names that data.source gi"):
        load_config(None, asked)


def test_a_metric_of_a_source_can_choose_the_best_checkpoint():
    asked = [("data.source", MIXED), "data.held_out=4", "evaluation.every=1"]
    load_config(None, [*asked, "checkpoint.best=eval/gym/pass@1"])
    with pytest.raises(InputError, match="is no metric of this evaluation; did you mean eval/gym/"):
        load_config(None, [*asked, "checkpoint.best=eval/gim/pass@1"])
