"""`jspec draft train` on a small model in a directory: stages, resuming, and what it says of
mistakes."""

import dataclasses
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

import jspec
from benchmarks import draft_losses
from jspec import formats
from jspec.cli import main
from jspec.config import load_config
from jspec.draft_config import DraftTrainingConfig
from jspec.draft_training import begin, samples, stages
from jspec.draft_training.prompts import in_turn, unseen
from jspec.errors import InputError
from jspec.hub import character_tokenizer
from jspec.model import ModelConfig, init_policy
from jspec.rl.losses import token_logprobs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a model of characters, drawn at random."""
    tokenizer = character_tokenizer("0123456789+= ")
    config = ModelConfig(family="llama", vocab_size=len(tokenizer), hidden_size=32,
                         intermediate_size=64, num_layers=2,
                         num_heads=4, num_kv_heads=2, head_dim=8, initializer_range=0.2,
                         stop_tokens=(tokenizer.eos_token_id,), pad_token=tokenizer.pad_token_id)
    directory = tmp_path_factory.mktemp("model") / "tiny"
    jspec.export(init_policy(config, jax.random.key(0)), directory, tokenizer)
    (directory.parent / "sums.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}+{j}=", "answer": str(i + j)}) + "\n" for i in range(10)
        for j in range(10)))
    return directory


def overrides(model, out, *more):
    return [f"output_dir={out}", f"samples.sources=[{model.parent}/sums.jsonl]", "samples.count=64",
            "samples.batch=16", "sampling.max_new_tokens=12", "training.state_steps=20",
            "training.steps=40", "training.vocab_size=9",
            "training.checkpoint_every=15", "draft.options.depths=2", "draft.learning_rate=3e-3",
            "draft.optimizer=muon", "report.count=8", "report.k=2", "report.temperatures=[1.0]",
            "report.rules=[rejection]", *more]


def further(path):
    """Overrides to start from the draft at `path`, which has options and a vocabulary of its
    own."""
    return [f"draft.path={path}", "draft.options=null", "training.vocab_size=0"]


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "draft"
    assert main(["draft", "train", str(model), *overrides(model, out)]) == 0
    return out


def test_it_leaves_a_draft_that_is_accepted(model, trained):
    policy = jspec.load(str(model), dtype="float32")
    draft = jspec.load_draft(policy, trained / "head")
    assert draft.config.vocab_size == 9 and draft.state["vocab"].shape == (9,)
    batch = jspec.PromptBatch.from_tokens([[3, 4, 5]] * 4, group_size=8, seed=0)
    sampling = jspec.Sampling(max_new_tokens=12)
    fresh = jspec.drafts.mtp(policy, jax.random.key(5), vocab=draft.state["vocab"])
    lengths = [float(jspec.rollout(policy, d, batch, sampling=sampling).acceptance_length)
               for d in (fresh, draft)]
    assert lengths[1] > lengths[0] + 0.15
    (record,) = json.loads((trained / "report.json").read_text())
    assert (record["k"] == 2 and record["prompts"] == 5 and len(record["acceptance_by_position"])
            == 2)
    assert (trained / "report.png").stat().st_size > 5000


def test_samples_hold_the_policys_own_states_and_logprobs(model, trained):
    policy = jspec.load(str(model), dtype="float32")
    rows = samples.read(trained / "samples")
    batch = stages.pack(rows[:6])
    assert batch.tokens.shape[1] % stages.UNIT == 0
    batch = batch.replace(trunk=jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.float32),
                                             batch.trunk))
    logprobs, *_ = token_logprobs(policy, batch.predicting(batch.trunk.hidden), batch.response(),
                                 batch.temperature)
    # states are kept in bfloat16
    np.testing.assert_allclose(np.where(batch.mask, logprobs, 0),
                               np.where(batch.mask, batch.logprobs, 0), atol=0.1)


def test_temperatures_take_turns_by_file(model, tmp_path):
    config = load_config(None, [f"model.name={model}", "samples.temperatures=[1.0,0.0]",
                                "sampling.max_new_tokens=6", "samples.batch=4"],
                         DraftTrainingConfig)
    policy = jspec.load(str(model), dtype="float32")
    samples.sample(config, policy, [[3, 4]] * 8, tmp_path / "samples")
    hot, cold = ([row for row in samples.read(tmp_path / "samples") if row["temperature"] == t]
                 for t in (1.0, 0.0))
    assert (len(hot) == len(cold)
            == 4 and all(np.array_equal(row["tokens"], cold[0]["tokens"]) for row in cold))
    np.testing.assert_array_equal(stages.pack([hot[0], cold[0]]).temperature, [1.0, 0.0])


def test_resumed_equals_uninterrupted(model, trained, tmp_path):
    """Two samples files are gone and the last checkpoints too: what is made again is the same."""
    out = tmp_path / "draft"
    shutil.copytree(trained, out)
    (out / "samples" / "00001.npz").unlink()
    steps = sorted(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    shutil.rmtree(out / "checkpoints" / str(steps[-1]))
    shutil.rmtree(out / "head")
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace(str(trained), str(out)))
    assert main(["draft", "train", str(model), *overrides(model, out)]) == 0
    a, b = (dict(np.load(d / "samples" / "00001.npz")) for d in (trained, out))
    np.testing.assert_array_equal(a["tokens"], b["tokens"])
    policy = jspec.load(str(model), dtype="float32")
    one, two = (jspec.load_draft(policy, d / "head").weights for d in (trained, out))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint_to_go_on_from(model, trained, tmp_path, monkeypatch):
    out, kept = tmp_path / "draft", stages.step_of
    shutil.copytree(trained / "samples", out / "samples")

    # traced at the first step on each loss; before kl are 20 on the next states
    def interrupted(*args, **kwargs):
        if "kl" in args:
            os.kill(os.getpid(), signal.SIGTERM)
        return kept(*args, **kwargs)

    monkeypatch.setattr(stages, "step_of", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["draft", "train", str(model), *overrides(model, out)])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert sorted(int(path.name) for path in (out / "checkpoints").iterdir()) == [20, 21]
    monkeypatch.setattr(stages, "step_of", kept)
    assert main(["draft", "train", str(model), *overrides(model, out)]) == 0
    policy = jspec.load(str(model), dtype="float32")
    one, two = (jspec.load_draft(policy, d / "head").weights for d in (trained, out))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_training_that_is_not_finite_stops_before_it_is_kept(capsys, model, trained, tmp_path):
    out = tmp_path / "draft"
    shutil.copytree(trained / "samples", out / "samples")
    for path in (out / "samples").iterdir():
        rows = dict(np.load(path))
        np.savez(path, **{**rows, "state0": np.full_like(rows["state0"], 0x7FC0)})  # bfloat16's NaN
    assert (main(["draft", "train", str(model),
                  *overrides(model, out, "training.checkpoint_every=1")]) == 2)
    assert ("loss or gradient is not finite at step 1; lower draft.learning_rate"
            in capsys.readouterr().err)
    assert not any(path.name.isdigit() for path in (out / "checkpoints").iterdir())
    assert (main(["draft", "train", str(model), *overrides(model, out, "draft.learning_rate=1e-4")])
            == 2)
    assert "not finite" in capsys.readouterr().err  # another rate is no other run


@pytest.mark.parametrize("change, message", [
    (["draft.name=none"], "'draft.name' must be one of"),
    (["draft.every_n_steps=2"], "unknown key 'draft.every_n_steps'"),
    (["draft.name=ngram"], "draft.name=ngram: this drafter has no weights to train"),
    (["samples.sources=[none.jsonl]"],
     "cannot read the prompts none.jsonl: No such file or directory; check samples.sources"),
    (["samples.sources=[self]"], "'self' needs a tokenizer with a chat template"),
    (["samples.max_prompt_tokens=2"],
     "has 0 prompts of at most samples.max_prompt_tokens=2 tokens"),
    (further("nowhere"), "no draft at nowhere"),
    (["draft.path=nowhere"], "the one at draft.path=nowhere has its own; set draft.options=null"),
    (["draft.path=nowhere", "draft.options=null"],
     "draft.path=nowhere has its own; set training.vocab_size=0"),
    (["training.step=3"], "unknown key 'training.step'; did you mean 'training.steps'?"),
    (["draft.options.depth=2"], "draft.options.depth: mtp has no such option, but depths, "),
    (["report.temperatures=[]"],
     "'report.temperatures' must be a list of numbers with one entry at least, not []"),
    (["report.temperatures=[0,-1]"],
     "'report.temperatures' must be a list with each entry at least 0"),
    (["samples.temperatures=[-1]"],
     "'samples.temperatures' must be a list with each entry at least 0"),
    (["report.rules=[rejection,blocks]"], "each entry one of rejection, block, coupled"),
    (["sampling.max_new_tokens=1"], "sampling.max_new_tokens must be at least 2"),
])
def test_mistakes_are_one_line(capsys, model, tmp_path, change, message):
    assert main(["draft", "train", str(model), *overrides(model, tmp_path / "x", *change)]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_mistake_does_not_claim_the_directory(capsys, model, tmp_path):
    begin(load_config(None, ["samples.sources=[none.jsonl]"], DraftTrainingConfig), tmp_path)
    assert (main(["draft", "train", str(model), *overrides(model, tmp_path, *further("nowhere"))])
            == 2)
    assert "no draft at nowhere" in capsys.readouterr().err


def test_prompts_that_are_trained_on_are_not_held_out(capsys, model, tmp_path):
    assert unseen({"a": [[1, 2], [3]], "b": [[4]]}, {"a": [[3], [4]]}) == {"a": [[1, 2]]}
    (tmp_path / "trained.jsonl").write_text('{"prompt": "0+1="}\n{"prompt": "0+9="}\n')
    same = f"report.prompts={tmp_path}/trained.jsonl"
    assert main(["draft", "train", str(model), *overrides(model, tmp_path / "x", same)]) == 2
    assert "every prompt that could be held out is trained on too" in capsys.readouterr().err


def test_another_configuration_is_refused(capsys, model, trained):
    assert (main(["draft", "train", str(model), *overrides(model, trained, "training.steps=41")])
            == 2)
    err = capsys.readouterr().err
    assert (f"{trained} holds a run with training.steps=40, not 41" in err
            and "a copy of its samples" in err)


def numbered(trained, out, custom):
    """A copy of a trained draft's directory whose checkpoints say of their format what is given."""
    shutil.copytree(trained, out)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(out)))
    found = [json.loads(path.read_text()) for path in checkpoint_metadata(out)]
    assert all(said["custom_metadata"] == {"format": formats.DRAFT_CHECKPOINT} for said in found)
    for path, said in zip(checkpoint_metadata(out), found, strict=True):
        path.write_text(json.dumps(said | {"custom_metadata": custom}))


def checkpoint_metadata(out):
    return sorted((out / "checkpoints").glob("*/_CHECKPOINT_METADATA"))


def test_a_newer_checkpoint_is_named(capsys, model, trained, tmp_path):
    numbered(trained, out := tmp_path / "draft", {"format": formats.DRAFT_CHECKPOINT + 1})
    before = [path.read_text() for path in checkpoint_metadata(out)]
    assert main(["draft", "train", str(model), *overrides(model, out)]) == 2
    assert re.search(r"error: the checkpoint .* has format 2, and this jspec \(.*\) reads formats "
                     "up to 1: a newer jspec wrote it", capsys.readouterr().err)
    assert before and [path.read_text() for path in checkpoint_metadata(out)] == before


@pytest.mark.slow
def test_another_report_goes_on(model, trained, tmp_path):
    numbered(trained, out := tmp_path / "draft", {})  # as before checkpoints had a format
    head = (out / "head" / "model.safetensors").read_bytes()
    assert (main(["draft", "train", str(model),
                  *overrides(model, out, "report.temperatures=[0]", "report.k=1")]) == 0)
    assert ([(r["temperature"], r["k"]) for r in json.loads((out / "report.json").read_text())]
            == [(0, 1)])
    assert (out / "head" / "model.safetensors").read_bytes() == head


def test_samples_of_an_earlier_version_are_named(trained, tmp_path):
    columns = dict(np.load(trained / "samples" / "00000.npz"))
    del columns["temperature"]
    np.savez(tmp_path / "00000.npz", **columns)
    with pytest.raises(InputError, match="00000.npz has no temperature"):
        samples.read(tmp_path)
    with pytest.raises(InputError, match="no answer of two tokens"):
        samples.read(tmp_path / "nothing")


def test_newer_samples_are_named_and_older_ones_read(trained, tmp_path):
    columns = dict(np.load(trained / "samples" / "00000.npz"))
    np.savez(tmp_path / "00000.npz", **(columns | {"format": columns["format"] + 1}))
    with pytest.raises(InputError,
                       match=r"00000.npz has format 2, and this jspec .* reads formats up to 1"):
        samples.read(tmp_path)
    del columns["format"]
    np.savez(tmp_path / "00000.npz", **columns)
    assert len(samples.read(tmp_path)) <= len(columns["start"])


def test_an_output_dir_is_where_its_head_is(model, trained, tmp_path):
    policy = jspec.load(str(model), dtype="float32")
    one, two = (jspec.load_draft(policy, path).weights for path in (trained, trained / "head"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    shutil.copytree(trained, tmp_path / "cut", ignore=shutil.ignore_patterns("head"))
    with pytest.raises(InputError, match="has not come to its end"):
        jspec.load_draft(policy, tmp_path / "cut")


def test_sources_take_turns():
    items = {"a": [1, 2, 3], "b": [7]}
    assert in_turn(("a", "b"), items, 5) == [1, 7, 2, 7, 3]
    # a source named twice has two turns
    assert in_turn(("a", "b", "a"), items, 6) == [1, 7, 2, 3, 7, 1]


def test_a_trained_draft_is_where_further_training_starts(model, trained, tmp_path):
    out = tmp_path / "further"
    few = ["training.state_steps=0", "training.steps=1", "draft.learning_rate=0",
           "samples.count=16"]
    assert (main(["draft", "train", str(model),
                  *overrides(model, out, *few, *further(trained / "head"))]) == 0)
    policy = jspec.load(str(model), dtype="float32")
    before, after = (jspec.load_draft(policy, directory / "head") for directory in (trained, out))
    jax.tree.map(np.testing.assert_array_equal, (before.weights, before.state),
                 (after.weights, after.state))


@pytest.mark.slow
def test_a_draft_model_starts_from_its_weights(model, tmp_path):
    """Nothing is solved for or drawn: at a rate of 0 what is written is what was given, and at
    another one it is not."""
    tokenizer = character_tokenizer("0123456789+= ")
    made = dataclasses.replace(jspec.load(str(model)).config, num_layers=1)
    small, out = str(tmp_path / "small"), tmp_path / "draft"
    jspec.export(init_policy(made, jax.random.key(1)), small, tokenizer)
    few = [*further(small), "draft.name=draft_model", "draft.optimizer=adamw", "samples.count=16",
           "training.state_steps=1", "training.steps=1", "training.warmup_steps=0",
           "report.count=2"]
    policy, drafter = jspec.load(str(model)), jspec.drafts.find("draft_model")
    want = jspec.load(small).weights
    for rate, same in ((0, True), (1e-2, False)):
        if out.exists():
            shutil.rmtree(out / "checkpoints")
        assert main(["draft", "train", str(model), *overrides(model, out, *few),
                     f"draft.learning_rate={rate}"]) == 0
        draft = jspec.load_draft(policy, out / "head")
        assert draft.name == "draft_model" and draft.drafter is drafter
        # files hold bfloat16
        off = [float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (draft.weights, want)),
                                                       strict=True)]
        assert (max(off) < 4e-3) == same, off
        if not same:
            assert max(off) < 3e-2


def test_least_squares_bring_the_states_nearer(model, trained):
    policy = jspec.load(str(model), dtype="float32")
    rows = samples.read(trained / "samples")
    batch = stages.pack(rows[:16])
    batch = batch.replace(trunk=jax.tree.map(lambda x: x.astype(np.float32), batch.trunk))
    fresh = jspec.drafts.mtp(policy, jax.random.key(0), depths=1)
    fitted = fresh.drafter.least_squares(policy, fresh, [batch])
    losses = [float(jax.jit(fresh.drafter.loss,
                            static_argnums=3)(policy, draft, batch, "states")[0])
              for draft in (fresh, fitted)]
    assert losses[1] < 0.8 * losses[0]


def test_every_row_once_an_epoch_and_the_same_order_again():
    rows = [{"start": 3, "mask": np.ones(n, bool)} for n in range(1, 25)]
    batches = stages.order(rows, 4, seed=1)
    epoch = [next(batches) for _ in range(6)]
    assert sorted(i for batch in epoch for i in batch) == list(range(24))
    again = stages.order(rows, 4, seed=1)
    assert [list(next(again)) for _ in range(6)] == [list(b) for b in epoch]


def test_defaults_load():
    assert load_config(None, [], DraftTrainingConfig).training.steps == 1000


@pytest.mark.slow
def test_losses_are_compared_from_one_start(trained, tmp_path):
    out = tmp_path / "losses.json"
    assert (draft_losses.main([str(trained), "--steps", "2", "--seeds", "1", "--json", str(out),
                               "--plot", str(tmp_path / "losses.png")]) == 0)
    start, *rest = json.loads(out.read_text())["rows"]
    assert start["steps"] == 0 and [record["loss"] for record in rest] == ["kl", "tv", "overlap"]
    assert all(record["acceptance_length"] > 1 and record["step_seconds"] > 0 for record in rest)
    assert (tmp_path / "losses.png").stat().st_size > 3000
    with pytest.raises(InputError,
                       match="draft.loss=kl, not tv; what may be given here is model.dtype, "):
        draft_losses.main([str(trained), "draft.loss=tv"])
    with pytest.raises(InputError, match="has no samples: give the output_dir"):
        draft_losses.main([str(tmp_path)])


@pytest.mark.parametrize("rising, rates",
                         [(0, [1.0]), (4, [0.25, 0.5, 0.75, 1.0, 1.0]), (99, [0.1, 0.2])])
def test_the_rate_rises_over_warmup_steps_and_falls_to_a_tenth(rising, rates):
    config = load_config(None, ["draft.learning_rate=1", f"training.warmup_steps={rising}"],
                         DraftTrainingConfig)
    schedule = stages.schedule(config, 20)
    np.testing.assert_allclose([schedule(i) for i in range(len(rates))], rates, rtol=1e-6)
    assert schedule(19) == pytest.approx(0.1, abs=0.03) and schedule(20) == pytest.approx(0.1)
