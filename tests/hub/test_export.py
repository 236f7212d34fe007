"""Export: the directory holds the same tensors, loads back as the same policy, and appears whole or
not at all."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jspec import hub
from jspec.errors import InputError
from jspec.hub.exporter import whole_directory
from jspec.model.params import to_rollout
from tests.hub.checkpoints import GOLDEN, one_by_one

CASES = sorted(p.parent.name for p in GOLDEN.glob("*/expected.npz"))


def tensors(directory):
    out = {}
    for file in Path(directory).glob("*.safetensors"):
        out.update(load_file(file))
    return {name: np.asarray(value, np.float32) for name, value in out.items()}


@pytest.mark.parametrize("case", CASES)
def test_an_exported_directory_has_identical_tensors(case, tmp_path):
    policy = hub.load(str(GOLDEN / case))
    hub.export(policy, tmp_path / "out")
    want, got = tensors(GOLDEN / case), tensors(tmp_path / "out")
    # a head is no part of the policy, and experts are written one by one
    want = {name: value for name, value in one_by_one(want).items() if "mtp_layers" not in name}
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    again = hub.load(str(tmp_path / "out"))
    assert again.config == policy.config
    jax.tree.map(np.testing.assert_array_equal, again.weights, policy.weights)


def test_shards_and_their_index(tmp_path):
    policy = hub.load(str(GOLDEN / "llama"))
    hub.export(policy, tmp_path / "out", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(policy.weights))
    jax.tree.map(np.testing.assert_array_equal, hub.load(str(tmp_path / "out")).weights,
                 policy.weights)


def test_the_tokenizer_goes_along(tmp_path):
    tokenizer = hub.character_tokenizer("0123456789+= ")
    hub.export(hub.load(str(GOLDEN / "llama")), tmp_path / "out", tokenizer)
    assert hub.load_tokenizer(str(tmp_path / "out")).encode("1 + 2") == tokenizer.encode("1 + 2")


def test_nothing_is_overwritten_and_nothing_is_left_half(tmp_path):
    policy = hub.load(str(GOLDEN / "llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError,
                       match="exists and is not an empty directory; export into a new one"):
        hub.export(policy, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]

    class Broken:
        bos_token_id = None

        def save_pretrained(self, directory):
            assert (directory / "model.safetensors").exists()
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        hub.export(policy, tmp_path / "new", Broken())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    (tmp_path / "empty").mkdir()
    assert hub.export(policy, tmp_path / "empty") == tmp_path / "empty"


def test_the_slower_of_two_writers_changes_nothing(tmp_path):
    with pytest.raises(OSError), whole_directory(tmp_path / "x") as late:
        with whole_directory(tmp_path / "x") as early:
            (early / "a").write_text("first")
        (late / "a").write_text("second")
    assert (tmp_path / "x" / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_exported(tmp_path):
    policy = hub.load(str(GOLDEN / "llama"))
    with pytest.raises(InputError, match="no published llama architecture"):
        hub.export(policy.replace(config=dataclasses.replace(policy.config, qk_norm=True)),
                   tmp_path / "a")
    with pytest.raises(InputError, match="training layout"):
        hub.export(to_rollout(policy), tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_an_export_and_gives_the_same_logits(case, tmp_path):
    """Needs torch, which is no dependency: run it where torch is installed beside jspec."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    hub.export(hub.load(str(GOLDEN / case)), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32,
                                                       output_loading_info=True)
    assert not any(info.values()), info
    with np.load(GOLDEN / case / "expected.npz") as data, torch.no_grad():
        got = model.eval()(torch.from_numpy(data["tokens"]).long()).logits.numpy()
        np.testing.assert_allclose(got, data["logits"], rtol=0, atol=1e-5)
