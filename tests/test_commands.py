"""`jspec rollout`, `eval`, `export` and `draft export` on a small model in a directory, end to end."""

import dataclasses
import json
from contextlib import contextmanager

import jax
import numpy as np
import pytest

import jspec
from jspec.cli import main
from jspec.commands import compare
from jspec.heads import files
from jspec.sources import choose_draft, open_source

REWARD = "def even(prompt, response, answer, **meta):\n    return float(int(answer) % 2 == 0)\n"


@pytest.fixture
def task(tmp_path):
    """Overrides for a task of six sums, of which the reward takes the even ones."""
    (tmp_path / "sums.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(6)))
    (tmp_path / "reward.py").write_text(REWARD)
    return [f"data.source={tmp_path}/sums.jsonl", f"reward.function={tmp_path}/reward.py:even", "reward.workers=1",
            "sampling.max_new_tokens=8"]


@pytest.fixture
def told(monkeypatch):
    """What commands say that they are doing."""
    said = []

    @contextmanager
    def telling(what, total=None):
        said.append(what)
        yield lambda parts=1: None

    monkeypatch.setattr("jspec.commands.telling", telling)
    return said


def test_rollout_side_by_side(capsys, model, told):
    code = main(["rollout", model, "--prompt", "1+1=", "--rule", "coupled", "--max-new-tokens", "12", "--samples", "2"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert told == [f"loading {model}", "compiling, then decoding one token at a time",
                    "timing: decoding one token at a time", "compiling, then decoding with ngram drafts",
                    "timing: decoding with ngram drafts"]
    assert "ngram (the same tokens)" in out and "autoregressive" in out
    for row in ("tokens/s", "speed-up", "tokens a cycle", "accepted, by draft position"):
        assert row in out


def test_which_draft(capsys, model):
    source = open_source(model, [])
    policy = source.load()
    assert choose_draft(source, None)(policy).config.name == "ngram"
    assert choose_draft(source, "none") is None
    trained = choose_draft(source, "mtp")(policy)
    assert "this mtp draft is fresh, not trained" in capsys.readouterr().err
    own = dataclasses.replace(source, draft=trained)
    assert choose_draft(own, None)(policy) is choose_draft(own, "mtp")(policy) is trained
    assert choose_draft(own, "ngram")(policy).config.name == "ngram"


def test_rollout_without_a_draft(capsys, model):
    assert main(["rollout", model, "--prompt", "1+1=", "--draft", "none", "--max-new-tokens", "4"]) == 0
    assert "ngram" not in capsys.readouterr().out


def test_a_prompt_that_does_not_fit_is_one_line(capsys, model):
    code = main(["rollout", model, "--prompt", "1" * 2000, "--max-new-tokens", "100"])
    assert code == 2
    assert "do not fit the model's 2048 positions" in capsys.readouterr().err


def test_where_two_rollouts_part():
    def rollout(tokens):
        return jspec.Rollout(tokens=np.array([tokens]), mask=np.ones((1, len(tokens)), bool), logprobs=None,
                             loss_mask=None, entropy=None, lengths=np.array([len(tokens)]), finished=None, stats=None)

    assert compare(rollout([1, 2, 3]), rollout([1, 2, 3])) == "the same tokens"
    assert compare(rollout([1, 2, 3]), rollout([1, 5, 3])) == "parts from it at token 1 of answer 0"
    assert compare(rollout([1, 2, 3]), rollout([1, 2])) == "parts from it at token 2 of answer 0"


def test_eval_counts_each_prompt_once(capsys, model, task, tmp_path):
    code = main(["eval", model, *task, "--prompts", "6", "--samples", "2", "--batch", "4", "--json", "-"])
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads(out)
    assert (result["prompts"], result["samples"]) == (6, 2)
    assert result["mean_reward"] == 0.5 == result["mean_of_the_best_sample"]  # 3 of the 6 answers are even
    assert result["standard_error"] == pytest.approx(np.std([0, 1] * 3, ddof=1) / 6**0.5)
    assert 0 < result["mean_tokens"] <= 8
    assert result["graded_0_by_failure"] == 0
    assert "mean reward" in err


def test_eval_of_more_prompts_than_there_are(capsys, model, task):
    assert main(["eval", model, *task, "--prompts", "7"]) == 2
    assert "--prompts 7 is more than" in capsys.readouterr().err


def test_export_of_a_model(capsys, model, tmp_path):
    assert main(["export", model, str(tmp_path / "copy")]) == 0
    one, other = jspec.load(model), jspec.load(str(tmp_path / "copy"))
    jax.tree.map(np.testing.assert_array_equal, one.weights, other.weights)
    assert main(["export", model, str(tmp_path / "copy")]) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err


def test_export_of_a_draft(capsys, model, tmp_path):
    policy = jspec.load(model)
    (tmp_path / "head").mkdir()
    draft = jspec.drafts.eagle3(policy, jax.random.key(1))
    files.write(draft, tmp_path / "head", dtype="float32")
    assert main(["draft", "export", model, str(tmp_path / "head"), str(tmp_path / "out")]) == 0
    read = jspec.load_draft(policy, tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), draft.weights, read.weights)
    assert main(["draft", "export", model, str(tmp_path / "head"), str(tmp_path / "out")]) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
    files.write(jspec.drafts.mtp(policy, jax.random.key(1)), tmp_path / "head")
    assert main(["draft", "export", model, str(tmp_path / "head"), str(tmp_path / "other")]) == 2
    assert "no published architecture" in capsys.readouterr().err
