"""Reward functions: which there are, what they take, and the one that ships for long answers."""

import pytest

from jspec.errors import InputError
from jspec.rl.reward_functions import Signature, answer_check, check_columns, check_reward
from jspec.rl.reward_functions import soft_overlong as overlong


@pytest.mark.parametrize("source, kind, is_async, asked", [
    ("def f(prompt, response, answer, **meta)", "answer", False, ""),
    ("def f(**everything)", "answer", False, ""),
    ("async def f(response, messages, **meta)", "answer", True, "messages"),
    ("def f(prompt, responses, **meta)", "group", False, ""),
    ("def f(prompts, responses, token_ids, **meta)", "batch", False, "token_ids"),
    ("async def f(completions, **kwargs)", "batch", True, "completions"),
    ("def f(response, completions, **meta)", "answer", False, "completions")])
def test_parameters_names_say_how_a_function_is_called(source, kind, is_async, asked):
    scope = {}
    exec(f"{source}: ...", scope)
    assert Signature.of(scope["f"]) == Signature(kind, is_async, frozenset(asked.split()))


def test_a_callable_object_may_be_async():
    class Judge:
        async def __call__(self, prompts, responses, **meta): ...

    assert Signature.of(Judge()) == Signature("batch", True)


@pytest.mark.parametrize("length, punishment", [
    (1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1)])
def test_the_soft_overlong_punishment_is_daposs(length, punishment):
    """Equation 13 of the paper: (L - c - n) / c between L - c and L."""
    assert overlong(length=length, max_new_tokens=100, buffer=20) == pytest.approx(punishment)
    assert overlong(length=length, max_new_tokens=100, prompt="p") == pytest.approx(punishment)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"

    def write(source):
        path.write_text(source)
        return f"{path}:f"

    return write


def refused(function, *more):
    with pytest.raises(InputError) as caught:
        check_reward(function, *more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_function_that_does_not_take_what_it_would_be_given(mine):
    assert "must take (prompts, responses, answer, **meta) by name: got an unexpected" in refused(
        {"b": mine("def f(completions): ...")})
    assert "must take (prompt, responses, answer, **meta) by name" in refused(
        mine("def f(prompt, responses): ..."))
    told = refused({"b": {"function": mine("def f(**meta): ..."), "options": {"length": 3}}})
    assert told == ("reward.function.b.options: 'length' is what a reward is told of the answer; "
                    "give the option another name")
    assert "no signature" in refused(mine("f = max"))


def test_a_misspelt_option_of_a_shipped_function():
    for function, option, takes in (("soft_overlong", "bufer", "buffer"),
                                    ("math_verify", "strict", "no options")):
        assert refused({"it": {"function": function, "options": {option: 3}}}) == (
            f"reward.function.it.options has {option!r}, and {function} takes {takes}")


def test_a_buffer_that_does_not_fit():
    for buffer in (0, 65, "8"):
        assert (refused({"brief": {"function": "soft_overlong", "options": {"buffer": buffer}}},
                        None, 64)
                == "reward.function.brief='soft_overlong': buffer must be a whole number from 1 to "
                f"sampling.max_new_tokens=64, not {buffer!r}")
    check_reward("soft_overlong", None, 1)


def test_an_argument_that_no_prompt_has(mine):
    functions = {"c": {"function": mine("def f(completions, solution, **kwargs): ..."),
                       "weight": 2}}
    check_reward(functions)
    check_columns(functions, "data.source=d.jsonl", {"prompt": "", "answer": "", "solution": ""})
    with pytest.raises(InputError, match="takes 'solution', which the prompts of data.source="
                       "d.jsonl do not say: they have answer, prompt; give it as"):
        check_columns(functions, "data.source=d.jsonl", {"prompt": "", "answer": ""})
    functions["c"]["options"] = {"solution": "x"}
    check_columns(functions, "data.source=d.jsonl", {"prompt": "", "answer": ""})


def test_answers_are_read_where_one_of_several_reads_them():
    several = {"brief": "soft_overlong", "math": "math_verify"}
    assert answer_check(several, "data.jsonl") is answer_check("math_verify", "data.jsonl")
    assert answer_check({"brief": "soft_overlong"}, "data.jsonl") is None
