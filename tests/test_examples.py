"""The examples do what they say, at tiny shapes."""

import asyncio
import importlib.util
import runpy
from pathlib import Path

import numpy as np

from jspec.config import load_config
from jspec.prepare import check_rewards
from jspec.reward_parts import reward_parts
from jspec.rl.records import read_jsonl
from jspec.rl.reward_calls import RewardInput, calls_of
from jspec.rl.reward_functions import Signature
from jspec.rl.reward_processes import Job, run

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rollout_in_a_jit_of_ones_own(model, tmp_path, capsys):
    """The README's lines too (`test_documents`), on a model of characters."""
    text = (EXAMPLES / "own_jit.py").read_text()
    assert text.count('"smollm2-135m-instruct"') == 3  # once in a comment
    there = tmp_path / "own_jit.py"
    there.write_text(text.replace('"smollm2-135m-instruct"', repr(model)))
    made = runpy.run_path(str(there))
    out = made["out"]
    assert out.tokens.shape == (8, 16) and len(made["texts"]) == 8
    assert np.all(np.asarray(out.stats.drafted) > 0)
    assert float(made["mean_logprob"]) < 0 and "nats a token" in capsys.readouterr().out


def test_a_reward_of_ones_own():
    records = read_jsonl(EXAMPLES / "own_reward.jsonl")
    for record in records:
        meta = {key: value for key, value in record.items() if key not in ("prompt", "answer")}

        def grade(response, length, record=record, meta=meta):
            item = RewardInput(record["prompt"], response, record["answer"], meta, True, length)
            (part,) = reward_parts(f"{EXAMPLES}/own_reward.py:short_and_right")
            calls = calls_of(part, Signature(), [item], 64)
            return run(Job(part, Signature(), calls, 60.0, 1))[0][0]

        right = f"It is {record['answer'].upper()}."
        assert [grade(right, 16)[0], grade(right, 17)[0], grade("?", 16)[0]] == [1.0, 0.5, 0.0]
        assert grade(right, 16)[1:] == (None, "")


def test_a_judge_that_is_asked_over_http():
    judge = example("judge")

    async def asked(*responses):
        async with await asyncio.start_server(judge.answered, judge.HOST, 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.gather(*(
                judge.judge([{"role": "user", "content": "1"}, {"role": "assistant", "content": x}],
                            "2345", port, length=4) for x in responses))

    assert asyncio.run(asked("2345", "23", "9999", "2346")) == [1.0, 0.5, 0.0, 0.75]
    config = load_config(EXAMPLES / "judge.yaml")
    check_rewards(config, config.data)
    assert [part.weight for part in reward_parts(config.reward.function)] == [1.0, 0.1]


def test_a_draft_that_learns_online():
    lengths = example("online_draft").main(steps=12)
    assert np.mean(lengths[-3:]) > 1.1 * lengths[0], lengths
