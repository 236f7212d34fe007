"""Training in two real processes gives what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jspec.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["steps=3", "speculation.rule=coupled", "data.prompts_per_step=2", "data.group_size=4", "reward.workers=1",
         "model.architecture.num_layers=1", "model.architecture.hidden_size=32", "checkpoint.every=3"]


def run(module, output_dir, *overrides):
    command = [sys.executable, "-m", *module, "train", "configs/tiny.yaml", f"output_dir={output_dir}", *overrides]
    one_device = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=one_device, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_records(output_dir / "metrics.jsonl"), done


@pytest.mark.parametrize("draft", ["ngram", pytest.param("mtp", marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives(tmp_path, draft):
    alone, _ = run(["jspec"], tmp_path / "one", *SMALL, f"draft.name={draft}")
    together, done = run(["jspec.local", "2"], tmp_path / "two", *SMALL, f"draft.name={draft}")
    assert "on 2 cpu device(s)" in done.stdout and "step 3/3" in done.stdout
    assert "step 3/3" not in done.stderr  # the second process is quiet
    assert len(alone) == len(together) == 3
    for one, two in zip(alone, together, strict=True):
        for exact in ("step", "reward", "reward_std", "length", "finished", "tokens", "acceptance"):
            assert one[exact] == pytest.approx(two[exact], rel=1e-6), exact
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    assert (tmp_path / "two" / "checkpoints" / "3").is_dir()
