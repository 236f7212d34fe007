"""Every signature of a reward function, with those that raise, die, hang and return nonsense."""

import dataclasses
import math

import numpy as np
import pytest

from jspec.reward_parts import reward_parts
from jspec.rl.reward_calls import calls_of, too_late
from jspec.rl.reward_functions import Signature
from jspec.rl.rewards import FAILURES, RewardInput, RewardPool

PLANTED = '''
import asyncio, os, time

def act(response):
    if response == "raise": raise ValueError("no")
    if response == "die": os._exit(3)
    if response == "hang": time.sleep(1000)
    if response == "nan": return float("nan")
    if response == "long": return 10**400
    return None if response == "none" else float(len(response))

def several(responses):
    if "text" in responses: return "wrong"
    return [act(response) for response in responses][:-1 if "short" in responses else None]

def answer(prompt, response, answer, **meta): return act(response)
def group(prompt, responses, answer, **meta): return several(responses)
def batch(prompts, responses, answer, **meta): return several(responses)

async def slow(responses):
    while "deaf" in responses:
        try: await asyncio.sleep(1000)
        except asyncio.CancelledError: pass
    if "hang" in responses: await asyncio.sleep(1000)
    if "block" in responses: time.sleep(1000)
    if "exit" in responses: await asyncio.gather(exits())
    await asyncio.sleep(0)

async def exits(): raise SystemExit(2)
async def one(prompt, response, answer, **meta): await slow([response]); return act(response)
async def panel(prompt, responses, **meta): await slow(responses); return several(responses)
async def court(prompts, responses, **meta): await slow(responses); return several(responses)

flying = most = 0
async def fly(prompt, response, answer, **meta):
    global flying, most
    flying += 1
    most = max(most, flying)
    await asyncio.sleep(0.01)
    flying -= 1
    return most
'''
KINDS = {"answer": "answer", "group": "group", "batch": "batch", "one": "answer", "panel": "group",
         "court": "batch"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "planted.py"
    path.write_text(PLANTED)
    return path


@pytest.fixture(scope="module")
def pool(planted):
    functions = {name: f"{planted}:{name}" for name in KINDS}
    with RewardPool(functions, workers=3, timeout_s=60.0) as pool:
        yield pool


def items(*groups):
    return [RewardInput("", response, "", group=number) for number, group in enumerate(groups)
            for response in group]


def expected(groups, bad, of=KINDS):
    """What each function gives, by its name, if nobody but those who see a response of `bad` is
    harmed."""
    def lost(kind, group, response):
        seen = {"answer": [response], "group": group, "batch": sum(groups, [])}[kind]
        return bool(set(seen) & bad)

    return {name: [0.0 if lost(kind, group, response) else float(len(response))
                   for group in groups for response in group] for name, kind in of.items()}


@pytest.mark.parametrize("response, failure, message", [
    ("raise", "raised", "ValueError: no"), ("die", "died", "its process ended with exit code 3"),
    ("exit", "died", "its process ended with exit code 1")])
def test_what_raises_or_dies_harms_only_its_own_call(pool, response, failure, message):
    groups = [["a", "bb"], [response, "ccc"], ["dddd"]]
    of = {name: kind for name, kind in KINDS.items()
          if response != "exit" or name in ("one", "panel", "court")}
    bad = {response}
    result = pool.grade(items(*groups))
    wanted = expected(groups, bad, of) | {name: [1, 2, 4, 3, 4] for name in KINDS.keys() - of}
    for name, values in wanted.items():
        np.testing.assert_array_equal(result.by_name[name], values, name)
    lost = sum(values.count(0.0) for values in wanted.values())
    assert result.failures == dict.fromkeys(FAILURES, 0) | {failure: lost}
    # of the first and second group what one function could grade was graded
    assert (result.failed, result.ungraded) == (5, response != "exit")
    assert message in result.messages[failure]
    np.testing.assert_array_equal(result.rewards, np.sum(list(wanted.values()), axis=0))


def test_what_hangs_harms_only_its_own_call(pool, monkeypatch):
    """An async call that blocks the event loop, and one that refuses to be cancelled, too."""
    monkeypatch.setattr(pool, "timeout_s", 2.0)
    groups = [["a", "bb"], ["hang", "ccc"], ["block", "dddd"], ["deaf", "e"]]
    result = pool.grade(items(*groups))
    sync = {name: kind for name, kind in KINDS.items() if name in ("answer", "group", "batch")}
    wanted = (expected(groups, {"hang", "block", "deaf"})
              | expected(groups, {"hang"}, sync))
    for name, values in wanted.items():
        np.testing.assert_array_equal(result.by_name[name], values, name)
    lost = sum(values.count(0.0) for values in wanted.values())
    assert result.failures == dict.fromkeys(FAILURES, 0) | {"timed_out": lost}
    assert "reward.timeout_s=2 seconds and was killed" in result.messages["timed_out"]


def test_values_that_are_none_and_lists_of_another_length(pool):
    groups = [["a", "nan", "none"], ["short", "ccc"], ["text"]]
    result = pool.grade(items(*groups))
    beside = pool.grade(items(["long", "a"]))
    np.testing.assert_array_equal(list(beside.by_name.values()), [[0, 1]] * len(KINDS))
    assert beside.failures == dict.fromkeys(FAILURES, 0) | {"raised": len(KINDS)}
    for name in ("answer", "one"):  # of one answer None is a return that was forgotten
        np.testing.assert_array_equal(result.by_name[name], [1, 0, 0, 5, 3, 4])
    for name in ("group", "panel"):
        np.testing.assert_array_equal(result.by_name[name], [1, 0, math.nan, 0, 0, 0])
    for name in ("batch", "court"):
        np.testing.assert_array_equal(result.by_name[name], [0] * 6)
    np.testing.assert_array_equal(result.rewards, [4, 0, 0, 10, 6, 8])
    assert result.failures == dict.fromkeys(FAILURES, 0) | {"invalid": 4 + 2 * 4 + 2 * 6}
    assert result.messages["invalid"].startswith("answer: returned float 'nan'")
    short = pool.grade(items(["short", "b"], ["text"]))
    assert "group: returned list of 1 for 2 answers, and must return a list" in (
        short.messages["invalid"])


def test_async_calls_overlap_as_far_as_they_may(planted):
    with RewardPool(f"{planted}:fly", workers=2, timeout_s=60.0, concurrency=50) as pool:
        result = pool.grade(items(["a"] * 100))
    assert result.rewards.max() == 50 and result.failed == 0


def test_weights_add_up_what_applies(planted):
    functions = {"long": {"function": f"{planted}:answer", "weight": 2},
                 "batch": {"function": f"{planted}:batch", "weight": -0.5, "timeout_s": 60},
                 "shown": {"function": f"{planted}:group", "weight": 0},
                 "math": {"function": f"{planted}:answer", "sources": ["math"]}}
    with RewardPool(functions, workers=1, timeout_s=60.0) as pool:
        result = pool.grade(items(["a", "none"], ["ccc", "nan"]))
        assert pool.grade([]).rewards.shape == (0,)
    # 0.5 of a length is not taken from "none", for which the batch's function has no word
    np.testing.assert_array_equal(result.rewards, [1.5, 0, 4.5, 0])
    np.testing.assert_array_equal(result.by_name["batch"], [1, math.nan, 3, 0])
    assert np.isnan(result.by_name["math"]).all()  # of prompts that are from elsewhere
    # "nan" of the first two, "none" of the first, where the others do not apply
    assert (result.failed, result.ungraded) == (2, 2)




ANSWERS = [RewardInput("p", "r", "a", {"x": 1}, True, 2, 0, [{"role": "user"}], [5, 1], [3]),
           RewardInput("p", "s", "a", {"x": 1}, False, 64, 0, [{"role": "user"}], [6] * 64, [3]),
           RewardInput("q", "t", "b", {"y": 2}, True, 1, 1, [{"role": "user"}], [1], [4])]


def arguments(reward, **options):
    part = reward_parts({"f": {"function": "file.py:f", "options": options}})[0]
    return [(list(call.rows), dict(call.arguments))
            for call in calls_of(part, Signature.of(reward), ANSWERS, 64)]


def test_what_each_signature_is_told():
    def one(prompt, response, answer, **meta): ...
    def group(prompt, responses, answer, token_ids, prompt_token_ids, **meta): ...
    def batch(prompts, responses, answer, messages, **meta): ...

    assert arguments(one, scale=3)[1] == ([1], {
        "prompt": "p", "response": "s", "answer": "a", "x": 1, "finished": False, "length": 64,
        "max_new_tokens": 64, "scale": 3})
    first, second = arguments(group)
    assert first == ([0, 1], {
        "prompt": "p", "responses": ["r", "s"], "answer": "a", "x": 1, "finished": [True, False],
        "length": [2, 64], "max_new_tokens": 64, "token_ids": [[5, 1], [6] * 64],
        "prompt_token_ids": [3]})
    assert second[0] == [2] and second[1]["y"] == 2
    assert arguments(batch) == [([0, 1, 2], {
        "prompts": ["p", "p", "q"], "responses": ["r", "s", "t"], "answer": ["a", "a", "b"],
        "x": [1, 1, None], "y": [None, None, 2], "finished": [True, False, True],
        "length": [2, 64, 1], "max_new_tokens": 64, "messages": [[{"role": "user"}]] * 3})]


def test_a_function_of_one_source_is_told_of_its_answers_alone():
    def batch(prompts, responses, answer, **meta): ...
    def one(prompt, response, answer, **meta): ...

    answers = [dataclasses.replace(answer, meta={"source_name": name})
               for answer, name in zip(ANSWERS, ("math", "code", "math"), strict=True)]
    (part,) = reward_parts({"f": {"function": "file.py:f", "sources": ["math"]}})
    (call,) = calls_of(part, Signature.of(batch), answers, 64)
    assert (list(call.rows), call.arguments["responses"]) == ([0, 2], ["r", "t"])
    assert [list(call.rows) for call in calls_of(part, Signature.of(one), answers, 64)] == [[0],
                                                                                          [2]]
    (part,) = reward_parts({"f": {"function": "file.py:f", "sources": ["gym"]}})
    assert calls_of(part, Signature.of(batch), answers, 64) == []


def test_a_function_written_for_trl_is_called_as_there():
    def accuracy(completions, x, **kwargs):
        return [float(text == "r") if value else None
                for text, value in zip(completions, x, strict=True)]

    def brief(prompts, completions, completion_ids, **kwargs):
        return [-float(len(ids)) for ids in completion_ids]

    ((_, told),) = arguments(accuracy)
    assert accuracy(**told) == [1.0, 0.0, None]
    ((_, told),) = arguments(brief)
    assert brief(**told) == [-2.0, -64.0, -1.0]


def test_a_function_written_for_trls_chats_is_called_as_there():
    """https://huggingface.co/docs/trl/grpo_trainer: messages where the prompts are, else texts."""
    def said(prompts, completions, **kwargs):
        assert "chat" not in kwargs and "messages" not in kwargs
        return [len(prompt[-1]["content"]) + len(completion[0]["content"])
                for prompt, completion in zip(prompts, completions, strict=True)]

    def of_prompt(prompt, completions, **kwargs):
        return [(prompt, completion) for completion in completions]

    chats = [dataclasses.replace(item, chat=[{"role": "system", "content": "be brief"},
                                             {"role": "user", "content": item.prompt},
                                             {"role": "assistant", "content": item.response}])
             for item in ANSWERS]
    (call,) = calls_of(reward_parts("f.py:f")[0], Signature.of(said), chats, 64)
    assert said(**call.arguments) == [2, 2, 2] and call.arguments["responses"] == ["r", "s", "t"]
    mixed = [chats[0], ANSWERS[1]]
    (call,) = calls_of(reward_parts("f.py:f")[0], Signature.of(of_prompt), mixed, 64)
    assert of_prompt(**call.arguments) == [
        ("p", [{"role": "assistant", "content": "r"}]), ("p", "s")]


def test_a_time_out_names_the_setting_that_it_is_of():
    (own,) = reward_parts({"a": {"function": "f.py:f", "timeout_s": 2}})
    (plain,) = reward_parts("f.py:f")
    assert "reward.function.a.timeout_s=2 seconds" in too_late(own, 2, 1)[0][2]
    assert "reward.timeout_s=3 seconds" in too_late(plain, 3, 1)[0][2]
