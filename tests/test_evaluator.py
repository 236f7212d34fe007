"""Evaluation while training: that it says what `jspec eval` says, changes nothing of the run, is
resumed to the same numbers, and that the best checkpoint is kept."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from jspec import evaluator, train
from jspec.cli import main
from jspec.config import load_config
from jspec.errors import InputError
from jspec.hub import character_tokenizer
from jspec.hub.names import located
from jspec.metrics import read_records
from jspec.run_dir import load_policy
from tests.tiny_runs import ROOT, SMALL, records, tiny

EVALUATED = ["evaluation.every=2", "evaluation.batch=6", "data.held_out=8", "checkpoint.every=3",
             "checkpoint.keep=1", "checkpoint.best=eval/mean@4", "steps=5",
             "draft.name=ngram", "draft.options={}"]


def scores(record):
    return {name: value for name, value in record.items() if name.startswith("eval/")}


def checkpoints(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with evaluations before the first step, after 2 and 4, and the last."""
    directory = tmp_path_factory.mktemp("evaluated")
    assert train.train(tiny(directory, *EVALUATED, "evaluation.at_start=true")) == 0
    return directory


def best_of(directory):
    every = {record["step"]: record for record in records(directory)}
    return max((step for step in every if step and "eval/mean@4" in every[step]),
               key=lambda step: (every[step]["eval/mean@4"], step))


def test_evaluations_stand_in_the_steps_records_and_change_nothing_of_the_run(whole, tmp_path):
    every = records(whole)
    assert [record["step"] for record in every] == list(range(6))
    evaluated = [record["step"] for record in every if scores(record)]
    assert evaluated == [0, 2, 4, 5]  # before the first, every second, after the last
    names = tiny(whole, *EVALUATED).evaluation.metrics([""])
    assert tuple(scores(every[2])) == names and set(every[0]) == {"step", *names}
    assert every[0]["eval/prompts"] == 8 and every[0]["eval/reward_failures"] == 0
    timed = read_records(whole / "metrics.jsonl")
    assert timed[2]["seconds/evaluation"] > 0 == timed[4]["compilations"]  # all was compiled before
    assert train.train(tiny(tmp_path, *EVALUATED[2:4], *EVALUATED[6:], "steps=3")) == 0
    for plain, record in zip(records(tmp_path), every[1:4], strict=True):
        assert plain == {name: record[name] for name in record if not name.startswith("eval/")}


class Killed(BaseException):
    """What ends a run at once."""


def test_a_run_killed_during_an_evaluation_resumes_to_the_same_numbers(whole, tmp_path,
                                                                       monkeypatch, capsys):
    decoded, calls = evaluator.decoded, []

    def killed(*given, **how):
        calls.append(0)
        if len(calls) == 6:  # the second batch after step 4
            raise Killed
        return decoded(*given, **how)

    config = tiny(tmp_path, *EVALUATED, "evaluation.at_start=true")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluator, "decoded", killed)
        train.train(config)
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3]
    assert train.train(config) == 0
    assert records(tmp_path) == records(whole)
    best = best_of(whole)
    assert checkpoints(tmp_path) == checkpoints(whole) == sorted({best, 5})
    assert f"the best by eval/mean@4 of step {best}" in " ".join(capsys.readouterr().out.split())


def test_eval_of_a_runs_checkpoint_says_what_the_run_said_then(whole, tmp_path, capsys):
    best, out = best_of(whole), tmp_path / "result.json"
    assert main(["eval", f"{whole}@best", "--run-code", "--json", str(out)]) == 0
    said = json.loads(out.read_text())["scores"]["all"]
    record = next(record for record in records(whole) if record["step"] == best)
    assert {f"eval/{name}": mean for name, (mean, _, _) in said.items()} == {
        name: value for name, value in scores(record).items() if "@" in name}
    assert all(low <= mean <= high for mean, low, high in said.values())
    assert "maj@4" in capsys.readouterr().out


def test_which_checkpoint_of_a_run_is_meant(whole, tmp_path):
    assert located(f"{whole}@5") == (whole, "5") and located(f"{tmp_path}@5")[1] == ""
    load_policy(f"{whole}@5")
    for name, said in (("best_", "after the @ comes best, or a step"), ("7", "checkpoints are of")):
        with pytest.raises(InputError, match=said):
            load_policy(f"{whole}@{name}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="has no config.yaml"):
        load_policy(f"{tmp_path}@best")


@pytest.mark.parametrize("overrides, message", [
    (["evaluation.every=1"], "needs prompts that training does not draw: set data.held_out or"),
    (["evaluation.at=[1,8]"], r"has 8, and 4 answers to a prompt have no pass@8"),
    (["checkpoint.best=eval/pass@1"], "and there are none: set evaluation.every"),
    (["evaluation.every=1", "data.held_out=4", "checkpoint.best=eval/pas@1"],
     "is no metric of this evaluation; did you mean eval/pass@1?"),
    (["evaluation.sources=[a.jsonl,b.jsonl,a.jsonl]"], "evaluation.sources names a.jsonl twice"),
    (["evaluation.max_new_tokens=1", "sampling.min_new_tokens=2"], "is below")])
def test_what_an_evaluation_cannot_be_is_one_line(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(None, overrides)


def test_an_answer_too_long_for_the_model_names_whose_setting_it_is(tmp_path):
    with pytest.raises(InputError, match="an evaluation's prompt of 3 tokens and "
                       "evaluation.max_new_tokens=62 do not fit the model's 64 positions; lower"):
        train.train(tiny(tmp_path, *EVALUATED, "evaluation.max_new_tokens=62"))


def test_what_an_evaluation_has_of_its_own_and_where_it_is_due():
    config = load_config(None, ["evaluation.temperature=0", "evaluation.top_p=0.5", "steps=5",
                                "evaluation.min_p=0.1",
                                "evaluation.every=2", "data.held_out=4", "sampling.top_k=7",
                                "grpo.biased_sampling=true"])
    sampling = evaluator.eval_sampling(config)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0, 0.5, 7, 0.1)
    due = evaluator.Evaluation(config, None, None, None).due
    assert [step for step in range(6) if due(step)] == [2, 4, 5]


def test_every_source_has_scores_of_its_own(tmp_path):
    for name, start in (("low", 1), ("high", 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"prompt": f"{start + i}", "answer": "1"}) + "\n" for i in range(3)))
    config = load_config(None, [f"evaluation.sources=[{tmp_path}/low.jsonl,{tmp_path}/high.jsonl]",
                                "evaluation.prompts=2", "evaluation.samples=2",
                                "data.chat_template=false", "evaluation.right_from=0.5"])
    tokenizer = character_tokenizer("0123456789")
    prompts = {label: evaluator.drawn(config, data)
               for label, data in evaluator.streams(config, tokenizer).items()}
    assert {label: len(of) for label, of in prompts.items()} == {"low": 2, "high": 2}
    rewards = np.float32([[1, 0], [0.5, 0.5], [0, 0]])
    votes = [["1", "2"], ["1", "1"], [None, "3"]]
    said = evaluator.Answered(["low", "low", "high"], rewards, np.full((3, 2), 4), rewards > 0,
                              votes, {}, 1).record(config)
    assert said == pytest.approx({
        "eval/mean@2": 1 / 3, "eval/pass@1": 0.5, "eval/pass@2": 2 / 3, "eval/maj@2": 0.5,
        "eval/low/mean@2": 0.5, "eval/low/pass@1": 0.75, "eval/low/pass@2": 1,
        "eval/low/maj@2": 0.75, "eval/high/mean@2": 0, "eval/high/pass@1": 0, "eval/high/pass@2": 0,
        "eval/high/maj@2": 0, "eval/length": 4, "eval/finished": 0.5, "eval/reward_failures": 1,
        "eval/prompts": 3})
    assert tuple(said) == config.evaluation.metrics(["low", "high"])


KILLER = """import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from configs.rewards.count_up import count_up
calls = pathlib.Path({calls!r})
def killer(prompt, response, answer, **meta):
    calls.open("a").write(".")
    if calls.stat().st_size == {last}:
        os.kill(os.getppid(), signal.SIGKILL)
    return count_up(prompt=prompt, response=response, answer=answer, **meta)
"""


@pytest.mark.slow  # the small version is above
def test_sigkill_during_an_evaluation(whole, tmp_path):
    """By the reward: of 16 answers a step and 48 an evaluation, in one of those after step 4."""
    (tmp_path / "killer.py").write_text(KILLER.format(
        root=str(ROOT), calls=str(tmp_path / "calls"), last=2 * 48 + 4 * 16 + 20))
    command = [sys.executable, "-m", "jspec", "train", "configs/tiny.yaml", *SMALL, *EVALUATED,
               "evaluation.at_start=true", f"reward.function={tmp_path}/killer.py:killer",
               f"output_dir={tmp_path}/run"]
    ended = [subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
             for _ in range(2)]
    assert ended == [-signal.SIGKILL, 0]
    assert records(tmp_path / "run") == records(whole)
