"""Adapters as PEFT reads them: its logits, and the files that gave them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspec import hub
from jspec.errors import InputError
from jspec.hub.adapter import HALVES, PREFIX, export_adapter
from jspec.hub.safetensors_io import read_tensors
from jspec.hub.tensors import stored_tensors
from jspec.model import Lora, logits, train_forward
from jspec.model.lora import merge, with_adapters

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("llama", "qwen3_moe")


def golden(case):
    """(policy with the golden adapters, PEFT's tensors, tokens, logits, config)."""
    with np.load(GOLDEN / case / "adapters.npz") as file:
        tensors = {name: file[name] for name in file if name.startswith(PREFIX)}
        tokens, want, config = file["tokens"], file["logits"], json.loads(str(file["config"]))
    lora = Lora(config["r"], config["lora_alpha"], tuple(config["target_modules"]), "float32")
    policy = with_adapters(hub.load(str(GOLDEN / case), dtype="float32"), lora, jax.random.key(0))
    adapters = jax.tree.map(np.zeros_like, policy.adapters)
    for tensor in stored_tensors(policy.config):
        for half, ending in HALVES.items():
            name = PREFIX + tensor.name.removesuffix("weight") + ending
            if name in tensors:
                adapters[tensor.key[-1]][half][tensor.place] = tensors[name]
    policy = policy.replace(adapters=jax.tree.map(jnp.asarray, adapters))
    return policy, tensors, tokens, want, config


def our_logits(policy, tokens):
    return np.asarray(logits(policy, train_forward(policy, jnp.asarray(tokens)).hidden))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case):
    policy, _, tokens, want, _ = golden(case)
    assert np.abs(our_logits(policy, tokens) - want).max() < 1e-4
    assert np.abs(our_logits(merge(policy), tokens) - want).max() < 1e-4
    assert np.abs(our_logits(policy.replace(adapters=None), tokens) - want).max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_that_peft_was_given(case, tmp_path):
    policy, tensors, _, _, config = golden(case)
    export_adapter(policy, tmp_path / "out", "base")
    written = read_tensors(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == config


def test_a_policy_without_adapters_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no adapters to export \(lora.rank=0\)"):
        export_adapter(hub.load(str(GOLDEN / "llama"), dtype="float32"), tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()
