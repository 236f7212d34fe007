"""Every command opens the same session: its arrays are on all devices, and rows are filled up for
them to divide."""

import contextlib
import importlib
import json
import logging
import sys
from pathlib import Path

import jax
import pytest

import jspec
from jspec import hub, session, sharding
from jspec.cli import main
from jspec.hub import eagle3
from tests.test_sharding import on_devices

TINY = jspec.ModelConfig(family="llama", vocab_size=16, hidden_size=16, intermediate_size=16,
                         num_layers=1, num_heads=8,
                         num_kv_heads=8, head_dim=8, initializer_range=0.2, stop_tokens=(1,))


def write_inputs(folder: Path) -> list[str]:
    """A model, prompts, and a draft; returns what a run of them is configured with."""
    policy = jspec.init_policy(TINY, 0)
    jspec.export(policy, folder / "model", hub.character_tokenizer("0123456789+= x"))
    eagle3.write(jspec.drafts.eagle3(policy, jax.random.key(0)), folder / "eagle3")
    (folder / "sums.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(24)))
    (folder / "reward.py").write_text("def even(prompt, response, answer, **meta):\n"
                                      "    return len(response) % 2.0\n")
    return [f"data.source={folder}/sums.jsonl", f"reward.function={folder}/reward.py:even",
            "reward.workers=1", "sampling.max_new_tokens=4"]


def run_commands(folder: Path, used: dict[str, list]) -> None:
    """The commands, at their smallest; `used` gets what `watched` sees of each."""
    task, model, run = write_inputs(folder), str(folder / "model"), str(folder / "run")
    (folder / "run.yaml").write_text(
        f"output_dir: {run}\nsteps: 1\nmodel: {{name: {model}}}\nmesh: {{fsdp: 2}}\n"
        "speculation: {k: 1}\ndata: {group_size: 2}\nprofile: {repeats: 1}\n")
    drafts = [f"output_dir={folder}/draft", f"samples.sources=[{folder}/sums.jsonl]",
              "samples.count=12", "samples.batch=6", "sampling.max_new_tokens=4",
              "training.state_steps=1", "training.steps=1", "training.rows=6", "report.count=1",
              "report.k=1", "report.temperatures=[1.0]", "report.rules=[coupled]"]
    commands = {
        "train": ["train", f"{folder}/run.yaml", *task],
        "profile": ["profile", f"{folder}/run.yaml", *task],
        "eval": ["eval", run, *task, "--run-code", "--prompts", "3", "--samples", "1"],
        "rollout": ["rollout", model, "--prompt", "1+1=", "--raw", "--draft", "none",
                    "--max-new-tokens", "4"], "export": ["export", run, f"{folder}/exported"],
        "draft train": ["draft", "train", model, *drafts],
        "draft export": ["draft", "export", model, f"{folder}/eagle3", f"{folder}/published"],
        "bench": ["bench", "--shape", "tiny", "--batch", "8", "--prompt-tokens", "4",
                  "--new-tokens", "2", "--rounds", "1"],
    }
    for name, command in commands.items():
        seen.clear()
        with contextlib.redirect_stdout(sys.stderr):
            assert main(command) == 0, name
        used[name] = sorted(seen)


seen: set = set()
"""(what, devices, whether it is more than copies) of the arrays that `watched` functions of a
command gave."""


def watched(owner: object, name: str, arrays) -> None:
    """Have a function note, of the arrays that `arrays` picks of its result and arguments, what
    holds them."""
    kept = getattr(owner, name)

    def watching(*arguments, **options):
        made = kept(*arguments, **options)
        for x in jax.tree.leaves(arrays(made, *arguments)):
            if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
                seen.add((name, len(x.sharding.device_set)))
        return made

    setattr(owner, name, watching)


def worker(folder: str) -> None:
    from jspec import commands, step
    from jspec.draft_training import stages
    from jspec.hub import exporter

    # the package has the function of that name
    rollout = importlib.import_module("jspec.speculate.rollout")
    watched(rollout, "_rollout", lambda out, policy, *_: (out.tokens, policy.weights))
    watched(step.Step, "take", lambda made, *_: made)
    watched(exporter, "host_value", lambda made, weights, tensor: weights)
    watched(stages, "run_stage", lambda saved, *_: saved)
    watched(commands, "publish", lambda made, draft, *_: draft.weights)
    used: dict[str, list] = {}
    run_commands(Path(folder), used)
    print(json.dumps(used))


EXPECTED = {"train": [["take", 8]], "profile": [["take", 8]], "eval": [["_rollout", 8]],
            "rollout": [["_rollout", 8]],
            "export": [["host_value", 8]], "draft train": [["_rollout", 8], ["run_stage", 8]],
            "draft export": [["publish", 8]], "bench": [["_rollout", 8]]}


@pytest.mark.slow
def test_every_command_uses_all_devices(tmp_path):
    assert EXPECTED == on_devices(8, "from tests.test_session import worker; "
                                  f"worker({str(tmp_path)!r})")


def sizes(mesh):
    return tuple(mesh.shape.values())


@pytest.mark.parametrize(("rows", "expected"),
                         [(8, (1, 8, 1)), (1, (1, 1, 8)), (6, (1, 2, 4)), (4, (1, 4, 2))])
def test_the_mesh_of_so_many_rows(rows, expected, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda *sizes: (*sizes[:3], len(sizes[3])))
    assert sharding.mesh_of_rows(TINY, rows, list(range(8))) == (*expected, 8)


def test_devices_that_neither_rows_nor_heads_can_use_are_named(monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    session.mesh_for(TINY, 3, "--samples")
    assert ("3 row(s) and this model's 8 heads can be split over 1 of 8 devices; --samples 8 uses "
            "them all" in capsys.readouterr().err)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jspec.InputError, match="1 of 8 devices"):
        session.mesh_for(TINY, 3, "--samples")


def test_rows_are_filled_up():
    assert sharding.filled([1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert sharding.filled([1, 2, 3], 8, rows=4) == [1, 2, 3, 1]
    assert sharding.filled([1, 2, 3], 1) == sharding.filled([1, 2, 3], 3) == [1, 2, 3]


def test_a_session_logs_where_it_is_told_to_and_gives_signals_back(capsys):
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with session.session("info") as opened:
        mesh = opened.use(sharding.mesh_of_weights(TINY))
        logging.getLogger("jspec.anything").info("told")
        assert jax.sharding.get_mesh() == mesh and signal.getsignal(signal.SIGTERM) != before
    assert jax.sharding.get_mesh().empty and signal.getsignal(signal.SIGTERM) == before
    assert "told" in capsys.readouterr().err
