"""`jspec rollout`, `eval`, `export` and `draft export` on a small model in a directory, end to
end."""

import dataclasses
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jspec
from jspec.choices import DRAFTERS
from jspec.choosing import Plan
from jspec.cli import main
from jspec.commands import Timed, compare, speed_table
from jspec.config import load_config
from jspec.errors import InputError
from jspec.evaluation import check_code, check_kept, prompts_of, speculation_of
from jspec.evaluator import asked, drawn
from jspec.heads import files
from jspec.hub import load_tokenizer
from jspec.rl.prompts import PromptData
from jspec.sources import choose_draft, open_source
from pallas_kernels.noise import seed_key

ROOT = Path(__file__).resolve().parent.parent
REWARD = "def even(prompt, response, answer, **meta):\n    return float(int(answer) % 2 == 0)\n"


@pytest.fixture
def task(tmp_path):
    """Overrides for a task of six sums, of which the reward takes the even ones."""
    (tmp_path / "sums.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(6)))
    (tmp_path / "reward.py").write_text(REWARD)
    return [f"data.source={tmp_path}/sums.jsonl", f"reward.function={tmp_path}/reward.py:even",
            "reward.workers=1", "sampling.max_new_tokens=8"]


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
    code = main(["rollout", model, "--prompt", "1+1=", "--rule", "coupled", "--max-new-tokens",
                 "12", "--samples", "2"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert (told == [f"loading {model}", "compiling, then decoding one token at a time",
                    "timing: decoding one token at a time", "compiling, then decoding with ngram "
                     "drafts", "timing: decoding with ngram drafts"])
    assert "ngram (the same tokens)" in out and "autoregressive" in out
    for row in ("tokens/s", "speed-up", "tokens a cycle", "accepted, by draft position"):
        assert row in out


def test_a_position_that_was_never_drafted_has_no_acceptance(capsys, model):
    """The cap lets two tokens out, and a third draft could be none of them."""
    assert main(["rollout", model, "--prompt", "1+1=", "--max-new-tokens", "2", "--k", "3"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "accepted, by" in line)
    assert line.rstrip().endswith("%  -")


def test_rollout_with_a_drafter_in_a_file(capsys, model):
    code = main(["rollout", model, "--prompt", "1+1=", "--max-new-tokens", "12", "--samples", "2",
                 "--draft", f"{ROOT}/examples/drafter.py:bigram"])
    out, err = capsys.readouterr()
    assert ((code, "bigram (the same tokens)" in out, "fresh, not trained" in err)
            == (0, True, False))
    assert main(["rollout", model, "--prompt", "1+1=", "--draft", "bigram"]) == 2
    assert (f"--draft: must be one of {', '.join(DRAFTERS)}, none, path/to/file.py:NAME, "
            "not 'bigram'" in (capsys.readouterr().err))


def test_which_draft(capsys, model):
    source = open_source(model, [])
    policy = source.load()
    assert choose_draft(source, None)(policy).name == "ngram"
    assert choose_draft(source, "none") is None
    trained = choose_draft(source, "mtp")(policy)
    assert "this mtp draft is fresh, not trained" in capsys.readouterr().err
    own = dataclasses.replace(source, read_draft=lambda: trained)
    assert choose_draft(own, None)(policy) is choose_draft(own, "mtp")(policy) is trained
    assert choose_draft(own, "ngram")(policy).name == "ngram"
    assert choose_draft(own, "mixed")(policy).weights is trained.weights


def test_a_draft_of_a_path_is_as_a_config_would_have_it(model, tmp_path):
    source = open_source(model, [])
    (tmp_path / "head").mkdir()
    files.write(jspec.drafts.eagle3(source.load(), 0), tmp_path / "head")
    for name in (None, "eagle3", "mixed"):
        made = choose_draft(source, name, str(tmp_path / "head"))(None)
        assert made.name == (name or "eagle3")
    with pytest.raises(InputError, match="--draft-path .*head holds a draft of the kind "
                       "eagle3, and mtp was asked for; ask for eagle3"):
        choose_draft(source, "mtp", str(tmp_path / "head"))
    with pytest.raises(InputError, match="--draft none drafts nothing, and --draft-path nowhere"):
        choose_draft(source, "none", "nowhere")
    with pytest.raises(InputError, match=r"drafter is a str: give jspec.drafts.find\(NAME\)"):
        jspec.load_draft(source.shape, tmp_path / "head", "eagle3")


def test_rollout_without_a_draft(capsys, model):
    assert (main(["rollout", model, "--prompt", "1+1=", "--draft", "none", "--max-new-tokens", "4"])
            == 0)
    assert "ngram" not in capsys.readouterr().out


def test_a_prompt_that_does_not_fit_is_one_line(capsys, model):
    code = main(["rollout", model, "--prompt", "1" * 2000, "--max-new-tokens", "100"])
    assert code == 2
    assert "do not fit the model's 2048 positions" in capsys.readouterr().err


def test_where_two_rollouts_part():
    def rollout(tokens):
        return jspec.Rollout(tokens=np.array([tokens]), mask=np.ones((1, len(tokens)), bool),
                             logprobs=None, loss_mask=None, entropy=None,
                             lengths=np.array([len(tokens)]), finished=None, stats=None)

    assert compare(rollout([1, 2, 3]), rollout([1, 2, 3])) == "the same tokens"
    assert compare(rollout([1, 2, 3]), rollout([1, 5, 3])) == "parts from it at token 1 of answer 0"
    assert compare(rollout([1, 2, 3]), rollout([1, 2])) == "parts from it at token 2 of answer 0"


def test_eval_counts_each_prompt_once(capsys, model, task, tmp_path):
    code = main(["eval", model, *task, "--prompts", "6", "--samples", "2", "--batch", "4", "--json",
                 "-"])
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads(out)
    assert (result["prompts"], result["samples"]) == (6, 2)
    # 3 of the 6 answers are even
    assert result["mean_reward"] == 0.5 == result["mean_of_the_best_sample"]
    assert result["standard_error"] == pytest.approx(np.std([0, 1] * 3, ddof=1) / 6**0.5)
    assert 0 < result["mean_tokens"] <= 8
    assert result["graded_0_by_failure"] == 0
    assert "mean reward" in err
    mean, low, high = result["scores"]["all"]["pass@2"]
    assert mean == 0.5 and low < 0.5 < high and list(result["scores"]["all"]) == [
        "mean@2", "pass@1", "pass@2", "maj@2"]
    assert "0.500 [" in err and "bootstrap over prompts" in " ".join(err.split())


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
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), draft.weights,
                 read.weights)
    assert main(["draft", "export", model, str(tmp_path / "head"), str(tmp_path / "out")]) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
    files.write(jspec.drafts.mtp(policy, jax.random.key(1)), tmp_path / "head")
    assert main(["draft", "export", model, str(tmp_path / "head"), str(tmp_path / "other")]) == 2
    assert "no published mtp head" in capsys.readouterr().err


def test_a_draft_model_is_exported_with_the_tokenizer_that_it_is_read_by(model, tmp_path):
    (tmp_path / "head").mkdir()
    made = jspec.drafts.draft_model(jspec.load(model), 0)
    files.write(made, tmp_path / "head", dtype="float32")
    assert main(["draft", "export", model, str(tmp_path / "head"), str(tmp_path / "out")]) == 0
    source = open_source(model, [])
    read = choose_draft(source, "draft_model", str(tmp_path / "out"))(None)
    jax.tree.map(np.testing.assert_array_equal, read.weights, made.weights)


def test_the_speed_up_of_other_texts_is_said_to_be_one_a_token():
    def timed(tokens):
        stats = jspec.speculate.RolloutStats(*(np.array(x, np.int32)
                                               for x in ([len(tokens)], [4], [2])))
        out = jspec.Rollout(tokens=np.array([tokens]), mask=np.ones((1, len(tokens)), bool),
                            logprobs=None, loss_mask=None, entropy=None,
                            lengths=np.array([len(tokens)]), finished=None, stats=stats)
        return Timed(out, 1.0)

    def labels(*runs):
        return list(speed_table(*runs, SimpleNamespace(name="mtp"), 1).columns[0].cells)

    assert "speed-up" in labels(timed([1, 2]), timed([1, 2]))
    assert "speed-up a token (other texts)" in labels(timed([1, 2]), timed([1, 2, 3]))


def spied(monkeypatch):
    """What is asked of `jspec.PromptBatch.from_tokens` from now on: (prompts, seed) of every
    call."""
    calls, made = [], jspec.PromptBatch.from_tokens

    def spy(prompts, *, seed, **options):
        calls.append(([tuple(prompt) for prompt in prompts], seed))
        return made(prompts, seed=seed, **options)

    monkeypatch.setattr(jspec.PromptBatch, "from_tokens", spy)
    return calls


def test_evaluation_has_noise_and_an_order_of_its_own(capsys, model, task, monkeypatch):
    calls = spied(monkeypatch)
    aside = ["steps=3", "draft.path=/x"]
    assert (main(["eval", model, *task, *aside, "--prompts", "6", "--samples", "2", "--batch", "2"])
            == 0)
    ours = [np.asarray(jax.random.key_data(seed)).tolist() for _, seed in calls]
    training = [np.asarray(jax.random.key_data(jax.random.fold_in(seed_key(0), step))).tolist()
                for step in range(100)]
    assert len(ours) == 3 and not any(key in training for key in ours)
    assert ("jspec: steps, draft.path: no part of an evaluation, and left aside"
            in capsys.readouterr().err)
    config = load_config(None, [*task, "data.prompts_per_step=2"])
    data = PromptData(config.data, load_tokenizer(model), seed=config.seed)
    assert ([prompts for prompts, _ in calls]
            != [[tuple(prompt.tokens) for prompt in next(data)] for _ in range(3)])


def test_evaluation_takes_what_was_held_out_and_a_runs_code_needs_permission(capsys, model, task):
    config = load_config(None, [*task, ("model.name", model), "data.held_out=2"])
    source = dataclasses.replace(open_source(model, [*task, "data.held_out=2"]), own=config,
                                 name="RUN")
    (data,) = prompts_of(source).values()
    training = PromptData(dataclasses.replace(config.data, prompts_per_step=1), source.tokenizer,
                          seed=config.seed)
    assert len(drawn(source.config, data)) == 2 and len(training.records) == 4
    ours, theirs = ({next(stream)[0].text for _ in range(4)} for stream in (data, training))
    assert len(ours) == 2 and not ours & theirs
    with pytest.raises(InputError, match="--prompts 3 is more than .* held out"):
        drawn(load_config(None, [*task, "evaluation.prompts=3"]), data, "--prompts ")
    with pytest.raises(InputError, match="RUN kept data.held_out=0 prompts by seed=0"):
        prompts_of(dataclasses.replace(source, own=load_config(None, task)))
    prompts_of(dataclasses.replace(source, config=load_config(None, task),
                                   own=load_config(None, task)))
    assert "RUN kept no prompts from training" in capsys.readouterr().err
    with pytest.raises(InputError, match="reward.py:even, which would run that file: look at it, "
                       "then give --run-code"):
        check_code(source, [], False)
    # another key of the section names no function
    with pytest.raises(InputError, match="would run that file"):
        check_code(source, ["reward.workers=1"], False)
    check_code(source, [], True)
    check_code(source, ["reward.function=mine.py:f"], False)
    check_code(dataclasses.replace(source, own=None), [], False)
    assert capsys.readouterr().err.count("grading with") == 3


def test_prompts_are_held_out_of_the_data_that_a_run_was_trained_on(monkeypatch, tmp_path, model,
                                                                    task):
    config = load_config(None, [*task, ("model.name", model), "data.held_out=2"])
    source = dataclasses.replace(open_source(model, [*task, "data.held_out=2"]), own=config,
                                 name="RUN")
    data = PromptData(config.data, source.tokenizer, seed=config.seed)
    next(data)
    monkeypatch.setattr("jspec.evaluation.data_position", lambda run: data.state())
    check_kept(source)
    with (tmp_path / "sums.jsonl").open("a") as file:  # which others would now be held out of
        file.write('{"prompt": "6+1=", "answer": "7"}\n')
    with pytest.raises(InputError, match="sums.jsonl is no longer what RUN was trained on"):
        check_kept(source)
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, options={"size": 9}))
    with pytest.raises(InputError, match="kept data.held_out=2 prompts by seed=0, of "
                       "data.options={'size': 9}, from"):
        prompts_of(dataclasses.replace(source, own=own))


def test_what_auto_drafts_in_an_evaluation(monkeypatch, model, task):
    """What the run did at last; and a pool without room for these drafts is refused before weights
    are read."""
    source = dataclasses.replace(open_source(model, task), name="RUN")
    own = dataclasses.replace(source, read_draft=lambda: jspec.drafts.ngram(source.shape))
    for k, drafted in ((None, 0), (0, 0), (((2, 7), (8, 0)), ((2, 7), (8, 0)))):
        monkeypatch.setattr("jspec.evaluation.run_plan", lambda run, k=k: Plan(k=k))
        assert (source.config.speculation.k, speculation_of(own).k) == ("auto", drafted)
    assert speculation_of(source).k == 0  # no draft, or draft.name=none
    monkeypatch.setattr("jspec.evaluation.run_plan", lambda run: pytest.fail("the plan is auto's"))
    fixed = dataclasses.replace(own, config=load_config(None, [*task, "speculation.k=40",
                                                               "rollout.kv_tokens=64",
                                                               "evaluation.prompts=1",
                                                               "evaluation.samples=2"]))
    assert speculation_of(fixed).k == 40
    plain = dataclasses.replace(fixed, read_draft=lambda: None)

    def ask(draft):
        prompts = {"": drawn(fixed.config, prompts_of(fixed)[""])}
        return asked(fixed.config, prompts, fixed.shape, draft, speculation_of(fixed), "rollout")

    assert ask(plain.draft).batches[0][1].group_size == 2
    with pytest.raises(InputError, match="rollout.kv_tokens = 64 are"):
        ask(fixed.draft)


def test_a_runs_draft_that_is_not_finite_is_refused_where_it_drafts(model, task):
    source = open_source(model, task)
    draft = jspec.drafts.mtp(jspec.load(model), 0)
    draft = draft.replace(weights=jax.tree.map(lambda x: x * np.nan, draft.weights))
    bad = dataclasses.replace(source, name="RUN", read_draft=lambda: draft)
    with pytest.raises(InputError, match="the mtp draft of RUN is not finite"):
        choose_draft(bad, None)
    assert choose_draft(bad, "none") is None


def test_a_policy_that_is_not_finite_is_refused_where_it_samples(model, task):
    policy = jspec.load(model)
    embed = policy.weights["embed"]
    bad = dataclasses.replace(open_source(model, task), name="MODEL", load=lambda: policy.replace(
        weights=policy.weights | {"embed": embed.at[0, 0].set(np.nan)}))
    with pytest.raises(InputError,
                       match="MODEL is not finite: its weight embed holds NaN or infinity; take"):
        bad.load_finite()
    assert dataclasses.replace(bad, load=lambda: policy).load_finite() is policy


@pytest.fixture
def weightless(monkeypatch):
    """Reading weights is an error from now on: what is refused has to be refused before."""
    def refuse(*arguments, **options):
        raise AssertionError("weights were read")

    for reader in ("jspec.hub.load", "jspec.sources.load_policy"):
        monkeypatch.setattr(reader, refuse)


@pytest.mark.parametrize(("arguments", "message"), [
    (["rollout", "{model}", "--prompt", "?"], "the tokenizer cannot encode the prompt '?'"),
    (["rollout", "{model}", "--prompt", "1" * 2000, "--max-new-tokens", "100"],
     "do not fit the model's 2048 positions"),
    (["rollout", "{model}", "--prompt", "1", "--seed", "-1"],
     "--seed: must be a whole number of at least 0, not '-1'"),
    (["rollout", "{model}", "--prompt", "1", "--seed", str(2**64)], "at most 18446744073709551615"),
    (["rollout", "{model}", "--prompt", "1", "--samples", "0"],
     "--samples: must be a whole number of at least 1"),
    (["rollout", "{here}/it's ${x}", "--prompt", "1"], "there is nothing at {here}/it's ${x} "),
    (["rollout", "{model}", "--prompt", "1", "--samples", str(2**21)],
     "at least 1 and at most 1048576, not '2097152'"),
    (["eval", "{model}", "--samples", str(2**21)],
     "--samples must be at most 1048576, not 2097152"),
    (["eval", "{model}", "--prompts", "7"], "--prompts 7 is more than"),
    (["eval", "{model}", "sampling.stop_tokens=[5000]"],
     "stop token 5000 is outside the model's vocabulary"),
    (["eval", "{model}", "--json", "{here}"], "--json {here} is a directory; name a file in it"),
    (["eval", "{model}", "--json", "{model}/config.json/x.json"],
     "what should be its folder is a file"),
    (["export", "{model}", "{model}"], "exists and is not an empty directory"),
    (["export", "{model}", "{model}/config.json/x"], "cannot be written to"),
    (["export", "runs/nothing/here", "{here}/out"],
     "there is nothing at runs/nothing/here (looked in "),
    (["export", "./nothing", "{here}/out"], "there is nothing at ./nothing"),
    (["draft", "export", "{model}", "nowhere", "{here}/out"], "no draft at nowhere"),
    (["draft", "export", "{model}", "nowhere", "{here}"], "exists and is not an empty directory"),
    (["rollout", "~nobody-/x", "--prompt", "1"],
     "model '~nobody-/x' cannot be looked at: Could not determine home"),
    (["draft", "export", "{model}", "nowhere", "~nobody-/x"],
     "directory '~nobody-/x' cannot be looked at: "),
    (["bench", "--shape", "tiny", "--json", "~nobody-/x"],
     "--json ~nobody-/x cannot be written: Could not determine"),
    (["bench", "drafts", "{model}", "--drafts", "self:bits=3", "--prompts", "{here}/sums.jsonl"],
     "--drafts self: self draft: bits = 3"),
    (["bench", "tail", "{model}", "--count", "97"], "--count 97 is more than the 96 prompts of "),
    (["bench", "tail", "{model}", "--micro-batch", "4"],
     "--micro-batch is of the update, which --grpo times; add it"),
    (["bench", "--weights", "{model}", "--prompt-tokens", "2048"],
     "do not fit the model's 2048 positions"),
    (["bench", "--drafts", "ngrm"], "unknown drafter 'ngrm'; did you mean 'ngram'?"),
    (["bench", "--shape", "tiny", "--drafts", "ngram:max_ngram=0"], "max_ngram"),
    (["bench", "--shape", "tiny", "--json", "{here}"],
     "--json {here} is a directory; name a file in it"),
    (["bench", "--rounds", "0"],
     "argument --rounds: must be a whole number of at least 1, not '0'"),
    (["bench", "--drfts", "none"], "unrecognized arguments: --drfts none"),
])
def test_mistakes_are_found_before_weights_are_read(capsys, model, task, tmp_path, weightless,
                                                    monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", sys.argv)
    arguments = [text.format(model=model, here=tmp_path, x="{x}") if "{" in text else text
                 for text in arguments]
    if arguments[0] == "eval":
        arguments += task
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    last = err.splitlines()[-1]
    assert (last.startswith("jspec: error: ")
            and message.format(model=model, here=tmp_path, x="{x}") in last)


def test_a_model_may_have_any_name(capsys, model, tmp_path):
    odd = tmp_path / "it's ${seed} [red] {a: 1}"
    shutil.copytree(model, odd)
    assert (main(["rollout", str(odd), "--prompt", "1+1=", "--draft", "none", "--max-new-tokens",
                  "4"]) == 0)
    assert main(["export", str(odd), str(tmp_path / "[bold]copy")]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path}/[bold]copy\n")
