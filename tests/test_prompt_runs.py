"""Runs over several sources of prompts, with a curriculum: what they say of each, and that they go
on where they were."""

import json
import shutil
import subprocess
import sys

import pytest

from jspec import train
from jspec.run_files import read_samples
from jspec.settings import to_yaml
from tests.test_train import NO_DRAFT, compile_once, same_run  # noqa: F401 - a fixture is among them
from tests.tiny_runs import records, tiny


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The settings of a run over two sources, of which one has prompts that are too long."""
    folder = tmp_path_factory.mktemp("sources")
    for name, texts in (("low", ["0", "1", "2", "012345678"]), ("high", ["7", "8", "9"])):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"prompt": text, "answer": "12345678"}) + "\n" for text in texts))
    (folder / "by_name.py").write_text(
        "def by_name(prompt, response, answer, source_name, **meta):\n"
        "    return float(source_name == 'low') * len(set(response)) / 16\n")
    return [("data.source", {"low": {"source": f"{folder}/low.jsonl", "weight": 3},
                             "high": f"{folder}/high.jsonl"}),
            f"reward.function={folder}/by_name.py:by_name", "data.too_long=skip",
            "data.max_prompt_tokens=8", "data.curriculum=true", *NO_DRAFT]


def test_a_run_over_several_sources_says_what_each_gave_and_resumes(mixed, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.train(tiny(whole, *mixed, "steps=3")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("prompts over data.max_prompt_tokens=8 left out (data.too_long): 1 of low"
            in said)
    for record in records(whole):
        assert record["prompts_left_out"] == 1
        assert (record["source/low/prompts"], record["source/high/prompts"]) == (3, 1)
        assert record["source/low/reward"] > 0 == record["source/high/reward"]
        assert record["reward"] == pytest.approx(record["source/low/reward"] * 3 / 4)
        assert record["length"] == pytest.approx(
            (3 * record["source/low/length"] + record["source/high/length"]) / 4)
        assert sum(value for name, value in record.items() if name.startswith("curriculum/")) == (
            pytest.approx(1))
    last = records(whole)[-1]
    assert last["curriculum/unseen"] == 0 and last["curriculum/never"] >= 0.5
    assert {(sample["prompt"], sample["source"]) for sample in read_samples(whole, 1)} <= {
        *((text, "low") for text in "012"), *((text, "high") for text in "789")}
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/3")
    assert train.train(tiny(parts, *mixed, "steps=3")) == 0  # from the checkpoint of step 2
    assert "going on after step 2" in capsys.readouterr().out
    assert records(parts) == records(whole)


@pytest.mark.slow
def test_two_processes_draw_what_one_does(mixed, tmp_path):
    config = tiny(tmp_path / "one", *mixed, "steps=5")
    assert train.train(config) == 0
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    done = subprocess.run([sys.executable, "-m", "jspec.local", "2", "train", str(file),
                           f"output_dir={tmp_path}/two"], capture_output=True, text=True,
                          timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    same_run(records(tmp_path / "one"), records(tmp_path / "two"))
