"""The whole loop on a tiny policy: that it says, learns, resumes to the same numbers, and stops as
it should."""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.rewards.count_up import count_up
from jspec import choosing, step, train
from jspec.checkpoint import Checkpoints
from jspec.clock import PHASES
from jspec.loggers.tensorboard import TensorBoard
from jspec.metrics import Metrics, read_records
from jspec.output_dir import claimed
from jspec.rl.prompts import PromptData
from jspec.rl.records import JsonLines
from jspec.run_dir import load_draft, run_plan
from jspec.run_files import read_samples
from jspec.speculate.schedule import Costs
from jspec.stopping import StopSignal
from tests.loggers.reading import tensorboard_values
from tests.tiny_runs import ROOT, SMALL, records, refused, tiny

COUPLED = ["steps=5", "speculation.rule=coupled"]
NO_DRAFT = ["draft.name=none", "draft.options={}"]


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """A cache of compiled programs for this module, and for the processes that it starts."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    names = {"jax_compilation_cache_dir": directory,
             "jax_persistent_cache_min_compile_time_secs": 0.0,
             "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 10 steps."""
    directory = tmp_path_factory.mktemp("whole")
    assert train.train(tiny(directory, "steps=10")) == 0
    return directory


def test_a_run_says_everything_that_is_asked_of_it(whole):
    every = read_records(whole / "metrics.jsonl")
    assert [record["step"] for record in every] == list(range(1, 11))
    wanted = {"reward", "length", "finished", "tokens_per_second", "acceptance_length",
              "acceptance", "acceptance_by_position", "logprob_gap", "logprob_gap_mean", "entropy",
              "clip_fraction", "grad_norm", "draft/grad_norm", "draft/loss", "reward_failures",
              "skipped", "draft_skipped", *(f"seconds/{phase}" for phase in PHASES)}
    for record in every:
        assert wanted <= record.keys()
        assert record["logprob_gap"] < 1e-4 and record["reward_failures"] == record["skipped"] == 0
        assert len(record["acceptance_by_position"]) == 3
    # no rate: it was compiled
    assert every[0]["seconds/compile"] > 0 and every[0]["tokens_per_second"] is None
    assert every[-1]["seconds/compile"] == 0 and every[-1]["tokens_per_second"] > 0
    # whatever lengths answers have
    assert every[0]["compilations"] > 0 == every[-1]["compilations"]
    assert (whole / "config.yaml").exists() and list((whole / "tensorboard").iterdir())
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [8, 10]
    for record in every:
        samples = read_samples(whole, record["step"])
        assert [sample["sample"] for sample in samples] == list(range(8))  # two groups of 4
        assert len({sample["prompt"] for sample in samples}) == 2
        assert all(sample["rewards"] == {"count_up": sample["reward"]}
                   and sample["accepted"] == sample["length"] - sample["cycles"] >= 0
                   for sample in samples)


def test_every_key_of_the_metrics_is_documented(whole):
    section = (ROOT / "docs" / "metrics.md").read_text().split("## The fields")[1].split("##")[0]
    known = {key for row in re.findall(r"^\| (`.*?) \|", section, re.M)
             for key in re.findall("`([^`]+)`", row)}
    keys = {key for record in read_records(whole / "metrics.jsonl") for key in record}
    assert not {key for key in keys if key not in known and re.sub("/.*", "/*", key) not in known}


def test_the_draft_learns_while_rewards_are_computed(whole, tmp_path):
    """The policy's side does not notice, and the draft comes out as from the update's own states,
    where it is due."""
    assert (train.train(tiny(tmp_path, "steps=4", "draft.features=rollout",
                             "draft.every_n_steps=2")) == 0)
    every, plain = read_records(tmp_path / "metrics.jsonl"), records(whole)
    assert [("draft/loss" in record) for record in every] == [True, False, True, False]
    assert all("seconds/draft" in record for record in every)
    assert every[0]["draft/loss"] == pytest.approx(plain[0]["draft/loss"], rel=1e-3)
    for name in ("reward", "loss", "grad_norm", "acceptance_length"):
        assert every[0][name] == plain[0][name]


def test_a_finished_run_started_again_does_nothing(whole, capsys):
    before = (whole / "metrics.jsonl").read_text()
    assert train.train(tiny(whole, "steps=10")) == 0
    assert (whole / "metrics.jsonl").read_text() == before
    assert "all 10 steps are done" in capsys.readouterr().out


class Killed(BaseException):
    """What ends a run at once."""


@pytest.mark.slow
def test_a_run_killed_in_a_loggers_write_resumes_to_the_same_numbers(whole, tmp_path, monkeypatch):
    write = TensorBoard.write

    def killed(self, entry):
        if entry.step == 3:
            self.writer.write_event(self.events.Event(step=3))  # a part of what the step has
            raise Killed
        write(self, entry)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TensorBoard, "write", killed)
        train.train(tiny(tmp_path, "steps=10"))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert train.train(tiny(tmp_path, "steps=10")) == 0
    assert records(tmp_path) == records(whole)
    assert ([key for key in tensorboard_values(tmp_path) if key[1] == "reward"]
            == [(step, "reward") for step in range(1, 11)])


IN_HOST = ["grpo.state_memory=host", "draft.state_memory=host"]


def test_optimizers_states_in_host_memory_change_nothing(whole, tmp_path, monkeypatch):
    """Nor does a run that goes on without."""
    save, kinds = Checkpoints.save, []

    def seen(self, step, state, *more):
        kinds.append({x.sharding.memory_kind
                      for x in jax.tree.leaves((state.opt_state, state.draft_opt_state))})
        save(self, step, state, *more)

    monkeypatch.setattr(Checkpoints, "save", seen)
    assert train.train(tiny(tmp_path, "steps=4", *IN_HOST)) == 0
    assert train.train(tiny(tmp_path, "steps=10")) == 0
    assert kinds == [{"pinned_host"}] * 2 + [{"device"}] * 3
    assert records(tmp_path) == records(whole)
    assert read_records(tmp_path / "metrics.jsonl")[3]["compilations"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["suffix", "mixed"])
def test_what_a_drafter_remembers_is_in_the_checkpoint(tmp_path, draft):
    """Four prompts, so that every step is an epoch; a history that was lost would show in what is
    accepted."""
    lines = (ROOT / "configs/data/count_up.jsonl").read_text().splitlines()
    (tmp_path / "four.jsonl").write_text("\n".join(lines[:4]) + "\n")
    overrides = [*(text for text in SMALL if "draft." not in text), f"draft.name={draft}",
                 f"data.source={tmp_path}/four.jsonl"]
    for directory, steps in (("whole", 5), ("parts", 2), ("parts", 5)):
        assert (train.train(tiny(tmp_path / directory, *overrides, f"steps={steps}", small=False))
                == 0)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    whole, parts = (load_draft(tmp_path / directory).state for directory in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    whole = whole.get("suffix", whole)
    # four prompts, last of all at step 5
    assert np.sort(whole["written"])[-5:].tolist() == [0, 17, 18, 19, 20]


def test_sigterm_stops_after_the_step_with_a_checkpoint(whole, tmp_path, monkeypatch, capsys):
    write = Metrics.write

    def interrupted(self, record):
        write(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", interrupted)
        assert train.train(tiny(tmp_path, "steps=10")) == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert ("stopping after this step, with a checkpoint" in said.err
            and "stopped after step 3 of 10" in said.out)
    assert (tmp_path / "checkpoints" / "3").is_dir()  # though 2 is what checkpoint.every says
    assert train.train(tiny(tmp_path, "steps=10")) == 0
    assert records(tmp_path) == records(whole)


@pytest.mark.slow
def test_an_output_that_nobody_reads_stops_the_run_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    class Closed(io.StringIO):  # as of `jspec train ... | head -2`
        def write(self, text):
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert train.train(tiny(tmp_path, "steps=10")) == 128 + signal.SIGPIPE
    said = [line for line in capsys.readouterr().err.splitlines()
            if "nobody reads the output" in line]
    assert len(said) == 1 and "the same command goes on" in said[0]
    assert len(records(tmp_path)) == 1 and (tmp_path / "checkpoints" / "1").is_dir()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with claimed(tmp_path):
        assert "is being written to by another run (process" in refused(tiny(tmp_path, "steps=10"))


def test_a_second_signal_stops_at_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.number == signal.SIGINT
        with pytest.raises(SystemExit) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert stopped.value.code == 128 + signal.SIGTERM


@pytest.mark.slow
def test_sigkill_at_any_moment_and_a_restart_give_the_uninterrupted_run(tmp_path):
    kills = 20
    steps = 12 * kills
    arguments = [*SMALL, f"steps={steps}", "checkpoint.every=3"]
    command = [sys.executable, "-m", "jspec", "train", "configs/tiny.yaml", *arguments]

    def start(directory):
        return subprocess.Popen([*command, f"output_dir={directory}"], cwd=ROOT,
                                stdout=subprocess.DEVNULL)

    assert train.train(tiny(tmp_path / "whole", *arguments)) == 0  # what it compiles is read back
    expected = records(tmp_path / "whole")
    assert len(expected) == steps
    rng = random.Random(0)
    for kill in range(kills):
        process = start(tmp_path / "killed")
        goal = (max((r["step"] for r in records(tmp_path / "killed")),
                    default=0) + rng.randrange(1, 9))
        if kill:  # the first time there is nothing to go on from yet
            goal = min(goal, steps - 2)
        while len(records(tmp_path / "killed")) < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.15)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
    assert start(tmp_path / "killed").wait(300) == 0
    assert records(tmp_path / "killed") == expected


def recorded(config, monkeypatch):
    """The rollouts of a run, on the host, and its records."""
    fetch, seen = step.fetch, []
    monkeypatch.setattr(step, "fetch", lambda out: seen.append(fetch(out)) or seen[-1])
    assert train.train(config) == 0
    return seen, records(config.output_dir)


@pytest.fixture(scope="module")
def coupled(tmp_path_factory):
    """Rollouts and records of a run whose tokens any other way of computing them must reproduce."""
    with pytest.MonkeyPatch.context() as patch:
        return recorded(tiny(tmp_path_factory.mktemp("coupled"), *COUPLED), patch)


def same_run(expected, got):
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert a["reward"] == b["reward"] and a["tokens"] == b["tokens"]
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert b["logprob_gap"] < 1e-4


def test_coupled_speculation_changes_neither_tokens_nor_rewards_nor_losses(coupled, tmp_path,
                                                                           monkeypatch):
    plain, described = recorded(tiny(tmp_path, *COUPLED, *NO_DRAFT), monkeypatch)
    for slow, fast in zip(plain, coupled[0], strict=True):
        np.testing.assert_array_equal(slow.tokens, fast.tokens)
        assert slow.stats.cycles.sum() > fast.stats.cycles.sum()
    same_run(coupled[1], described)
    assert all("acceptance" not in record and record["acceptance_length"] == 1
               for record in described)


@pytest.mark.slow
@pytest.mark.parametrize("draft, options", [
    (f"{ROOT}/examples/drafter.py:bigram", "{}"),
    ("mixed", "{draft: dflash, options: {layers: 1}}"),
    ("mixed", "{draft: dspark, options: {layers: 1}}"),
    ("mixed", "{draft: peagle, options: {aux_depths: [0, 1]}}"),
    ("mixed", "{draft: draft_model, options: {model: {intermediate_size: 16}}}")])
def test_other_drafters_change_nothing_either_and_their_runs_resume(coupled, tmp_path, draft,
                                                                    options):
    for steps in (1, 3):
        assert train.train(tiny(tmp_path, *COUPLED, f"draft.name={draft}",
                                f"draft.options={options}", f"steps={steps}")) == 0
    same_run(coupled[1][:3], records(tmp_path))
    assert all(record["acceptance_length"] > 1 for record in records(tmp_path))


def test_a_run_drafts_what_pays_and_goes_on_with_it(coupled, tmp_path, monkeypatch, capsys):
    """Under the coupled rule nothing else shows; what was measured is the run's from then on."""
    costs = Costs((16,), 1, ((16, 0.01),),
                  ((16, 1, 0.01), (16, 2, 0.01), (16, 3, 0.01), (16, 4, 0.1)), compiling=1e9)
    monkeypatch.setattr(choosing, "kept", lambda subject: costs)
    monkeypatch.setattr(choosing, "prompts_of", lambda subject: None)
    monkeypatch.setattr(choosing, "accepted", lambda subject, prompts: (0.8, 0.6, 0.4))
    auto = (*COUPLED, "speculation.k=auto", "checkpoint.every=1")
    with monkeypatch.context() as patch:
        first, _ = recorded(tiny(tmp_path, *auto, "steps=2"), patch)
    assert "k = 3:" in capsys.readouterr().out
    monkeypatch.setattr(choosing, "kept", lambda subject: pytest.fail("it is in the checkpoint"))
    then, described = recorded(tiny(tmp_path, *auto), monkeypatch)
    for one, other in zip([*first, *then], coupled[0], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.stats.ks == (3,)
    assert [record["loop_k"] for record in described] == [[3]] * 5
    assert run_plan(tmp_path).k == ((16, 3),) and run_plan(tmp_path).costs == costs


def jspec_train(module, *overrides, **environment):
    command = [sys.executable, "-m", *module, "train", "configs/tiny.yaml", *SMALL, *COUPLED,
               *overrides]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True,
                          text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


KV_HEADS = "model.architecture.num_kv_heads=2"  # fewer than the tensor axis has shards


@pytest.mark.slow  # tests/test_sharding.py has the small version
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_eight_devices_compute_what_one_does(coupled, tmp_path, shape):
    axes = [f"mesh.{name}={size}"
            for name, size in zip(("data", "fsdp", "tensor"), shape, strict=True)]
    jspec_train(["jspec"], f"output_dir={tmp_path}", *axes,
                XLA_FLAGS="--xla_force_host_platform_device_count=8")
    same_run(coupled[1], records(tmp_path))


@pytest.mark.slow  # the small version is above
@pytest.mark.parametrize("way", [["draft.features=rollout"], ["grpo.mini_batches=2"],
                                 ["data.dynamic_sampling=2", "grpo.kl_reference_every=2",
                                  "grpo.kl_weight=0.1"],
                                 ["grpo.optimizer=muon", "grpo.correction=tis",
                                  "grpo.updates_per_rollout=2"]])
def test_states_in_host_memory_on_eight_devices(tmp_path, way):
    """To the last digit, and over a resume."""
    axes = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", *way]
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    jspec_train(["jspec"], f"output_dir={tmp_path}/device", *axes, **eight)
    for steps in (3, 5):
        jspec_train(["jspec"], f"output_dir={tmp_path}/host", *axes, *IN_HOST, f"steps={steps}",
                    **eight)
    assert records(tmp_path / "host") == records(tmp_path / "device")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_eight_devices_with_two_kv_heads(tmp_path, shape):
    axes = [f"mesh.{name}={size}"
            for name, size in zip(("data", "fsdp", "tensor"), shape, strict=True)]
    jspec_train(["jspec"], f"output_dir={tmp_path}/one", KV_HEADS)
    jspec_train(["jspec"], f"output_dir={tmp_path}/eight", KV_HEADS, *axes,
                XLA_FLAGS="--xla_force_host_platform_device_count=8")
    same_run(records(tmp_path / "one"), records(tmp_path / "eight"))


@pytest.mark.parametrize("starts", [(5,), pytest.param((2, 5), marks=pytest.mark.slow)])
def test_two_processes_compute_what_one_does(coupled, tmp_path, starts):
    """With the optimizers' states in host memory, which every process moves for itself."""
    for steps in starts:  # the second start resumes
        jspec_train(["jspec.local", "2"], f"output_dir={tmp_path}", f"steps={steps}", *IN_HOST)
        assert len(records(tmp_path)) == steps
    same_run(coupled[1], records(tmp_path))


OVER = ["base=dapo", "data.over_sampling=1.5", "data.group_size=2", "logging.samples=8",
        f"reward.function={{task: '{ROOT}/configs/rewards/count_up.py:count_up', "
        "overlong: soft_overlong}"]


@pytest.mark.slow
def test_steps_that_draw_more_than_they_learn_from(tmp_path, monkeypatch):
    """The preset of DAPO, whose groups without spread are replaced, over-sampled: what goes on
    stays together, and a run in parts is the whole one."""
    rollouts, whole = recorded(tiny(tmp_path / "whole", *OVER, "steps=3"), monkeypatch)
    for steps in (2, 3):
        assert train.train(tiny(tmp_path / "parts", *OVER, f"steps={steps}")) == 0
    assert records(tmp_path / "parts") == whole
    assert len(rollouts) > 3 and all(len(out.lengths) == 12 for out in rollouts)
    assert max(record["groups_drawn"] for record in whole) > 4
    for record in whole:
        assert record["groups_dropped"] * 2 == record["groups_drawn"]  # 2 of 6, and 4 graded
        assert record["logprob_gap"] < 1e-4 and 0 <= record["dropped_unfinished"] <= 1
        assert record["length_kept"] < 8 and record["reward_differs"] > 0
    assert any(not out.done.all() for out in rollouts)
    samples = read_samples(tmp_path / "whole", 3)
    assert len(samples) == 8 and len({sample["prompt"] for sample in samples}) == 4
    for sample in samples:
        assert sample["rewards"]["task"] == pytest.approx(count_up(**{
            name: sample[name] for name in ("prompt", "response", "answer")}))


@pytest.mark.slow
def test_two_processes_over_sample(tmp_path):
    for steps in (1, 3):
        jspec_train(["jspec.local", "2"], f"output_dir={tmp_path}", f"steps={steps}",
                    "data.over_sampling=1.5", "data.dynamic_sampling=2", "data.group_size=2")
    every = records(tmp_path)
    assert len(every) == 3 and all(record["groups_dropped"] * 2 == record["groups_drawn"]
                                   and record["logprob_gap"] < 1e-4 for record in every)


def check_learning(every, last, reward):
    assert every[0]["reward"] < 0.2
    assert np.mean([r["reward"] for r in every[-last:]]) > reward
    first, final = (np.mean([r["acceptance_length"] for r in part])
                    for part in (every[:5], every[-last:]))
    assert final > first + 0.5, (first, final)


def test_the_tiny_policy_learns_and_its_draft_with_it(whole, tmp_path):
    assert train.train(tiny(tmp_path, "steps=60", "checkpoint.every=60")) == 0
    assert records(tmp_path)[:10] == records(whole)
    check_learning(records(tmp_path), 5, 0.6)


@pytest.mark.slow
def test_the_tiny_run_ends_above_four_fifths_within_three_minutes(tmp_path):
    start = time.monotonic()
    assert train.train(tiny(tmp_path, small=False)) == 0
    assert time.monotonic() - start < 180
    check_learning(records(tmp_path), 10, 0.8)


@pytest.mark.slow  # when a run ends is in test_health.py
def test_five_updates_in_a_row_that_are_no_numbers_stop_the_run(whole, tmp_path, monkeypatch,
                                                                capsys):
    assert train.train(tiny(tmp_path, "steps=2")) == 0
    shutil.copytree(tmp_path, tmp_path / "other")
    real = step.advantages_of
    with monkeypatch.context() as patch:
        patch.setattr(step, "advantages_of", lambda *a: real(*a) * np.nan)
        # fewer in a row, but the last of all
        assert train.train(tiny(tmp_path / "other", "steps=4")) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert "all 4 steps are done, but the last one taught nothing" in said
        assert "not the learning rate" in said and "the newest of step 4" in said
        # and says so whenever it is asked
        assert train.train(tiny(tmp_path / "other", "steps=4")) == 1
        assert train.train(tiny(tmp_path, "steps=10")) == 1
    every = records(tmp_path)
    assert ([record["skipped_in_row"] for record in every]
            == [0, 0, 1, 2, 3, 4, 5] and every[-1]["loss"] is None)
    assert every[-1]["draft_skipped"] == 0  # the draft was trained all the same
    said = " ".join(capsys.readouterr().out.split())
    assert ("update skipped (5 in a row" in said and "grpo.max_skipped=5" in said
            and "stopped at step 7 of 10" in said)
    # from the checkpoint of step 2, which is intact
    assert train.train(tiny(tmp_path, "steps=10")) == 0
    assert records(tmp_path) == records(whole)


def test_weights_that_run_away_end_the_run_at_the_first_step_that_shows_it(tmp_path, capsys):
    """Step 1 blows them up, at which a checkpoint is due: there is none of such weights."""
    assert train.train(tiny(tmp_path, "steps=10", "grpo.learning_rate=1e30", "checkpoint.every=1",
                            *COUPLED[1:], *NO_DRAFT)) == 1
    assert [record["skipped_in_row"] for record in records(tmp_path)] == [0]
    said = " ".join(capsys.readouterr().out.split())
    assert "its weights have run away (up to 1e+30); lower grpo.learning_rate=1e+30" in said
    assert "stopped at step 1 of 10" in said and not (tmp_path / "checkpoints" / "1").exists()


@pytest.mark.slow
def test_a_prompt_that_a_later_step_cannot_use(tmp_path, monkeypatch, capsys):
    """It is named before its step, with what was computed saved; once it is mended the same command
    goes on."""
    lines = (ROOT / "configs/data/count_up.jsonl").read_text().splitlines()[:16]
    path = tmp_path / "late.jsonl"
    path.write_text("\n".join([*lines[:13], '{"prompt": "x", "answer": "1"}', *lines[14:]]))
    config = tiny(tmp_path / "run", f"data.source={path}", "data.shuffle=false", "steps=4")
    monkeypatch.setattr(JsonLines, "at_once", 0)
    monkeypatch.setattr(PromptData, "look_on", lambda self, numbers: None)
    assert train.train(config) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert (f"{path}:14: the tokenizer cannot encode the prompt 'x'" in said
            and "stopped after step 3 of 4" in said)
    # of three steps, the first
    assert said.count("compiling the rollout") == said.count("compiling the update") == 1
    assert (tmp_path / "run/checkpoints/3").is_dir()
    assert ("late.jsonl:14: the tokenizer cannot encode the prompt 'x': 'x' is not in its alphabet"
            in refused(config))
    path.write_text("\n".join(lines))
    assert train.train(config) == 0


def test_a_reward_that_fails_for_every_answer_is_named_at_once_and_is_no_success(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(prompt, response, answer, **meta):\n"
                                     "    raise RuntimeError('no')\n")
    config = tiny(tmp_path / "run", "steps=1", f"reward.function={tmp_path}/bad.py:bad")
    assert train.train(config) == 1
    (record,) = records(tmp_path / "run")
    assert (record["reward"] == 0 and record["reward_failures"] == record["reward_failures/raised"]
            == 16)
    said = " ".join(capsys.readouterr().out.split())
    assert ("reward_failures 16" in said
            and "ALARM: the reward failed for every one of the step's 16 answers" in said)
    assert ("RuntimeError: no" in said
            and "all 1 steps are done, but the last one taught nothing" in said)
    assert "the newest of step 1" in said and "lower" not in said
    assert train.train(config) == 1  # and says so whenever it is asked


def test_a_draft_made_for_another_policy(whole, tmp_path):
    said = refused(tiny(tmp_path, f"draft.path={whole}", "model.architecture.hidden_size=48"))
    assert "draft was made for another policy: its hidden_size is 32, the policy's is 48" in said
    assert "holds a draft of the kind mtp, and ngram was asked for; ask for mtp" in refused(
        tiny(tmp_path, f"draft.path={whole}", "draft.name=ngram"))
    assert "draft.train=true: ngram has no weights to train; leave it out" == refused(
        tiny(tmp_path, "draft.name=ngram", "draft.train=true"))


def test_a_run_under_another_configuration(whole):
    assert "grpo.mini_batches=1, not 2" in refused(tiny(whole, "grpo.mini_batches=2"))
    assert "checkpoint.resume is false" in refused(tiny(whole, "checkpoint.resume=false"))


@pytest.mark.slow
def test_the_policy_moves_away_from_the_reference(tmp_path):
    assert (train.train(tiny(tmp_path, "steps=2", "grpo.kl_weight=0.1",
                             "grpo.updates_per_rollout=2")) == 0)
    first, second = records(tmp_path)
    # means over two updates; at the very first they are the same
    assert first["kl"] > 1e-4 and second["kl"] > 1e-4
