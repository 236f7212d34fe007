"""Evaluation while training: that it says what `jspec eval` says, changes nothing of the run, is
resumed to the same numbers, and that the best checkpoint is kept."""

import json

import pytest

from jspec import evaluator, train
from jspec.cli import main
from jspec.config import load_config
from jspec.errors import InputError
from jspec.metrics import read_records
from tests.test_train import ROOT, records, tiny

EVALUATED = ["evaluation.every=2", "evaluation.samples=4", "evaluation.batch=6", "data.held_out=8",
             "checkpoint.every=3", "checkpoint.keep=1", "checkpoint.best=eval/mean@4", "steps=5"]


def scores(record):
    return {name: value for name, value in record.items() if name.startswith("eval/")}


class Killed(BaseException):
    """What ends a run at once."""


def killed_in_evaluation(monkeypatch, config, call):
    """Runs until the batch of this number of an evaluation has been decoded."""
    decoded, calls = evaluator.decoded, []

    def until(*given, **how):
        out = decoded(*given, **how)
        calls.append(len(calls) + 1)
        if calls[-1] == call:
            raise Killed
        return out

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluator, "decoded", until)
        train.train(config)


def test_an_evaluation_that_was_killed_says_the_same_again_and_the_best_is_kept(
        tmp_path, monkeypatch, capsys):
    whole = tiny(tmp_path / "whole", *EVALUATED, "evaluation.at_start=true")
    assert train.train(whole) == 0
    out = " ".join(capsys.readouterr().out.split())
    every = {record["step"]: record for record in records(tmp_path / "whole")}
    print(json.dumps(list(every.values())))
