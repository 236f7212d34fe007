"""What parameters are stored as: every name, every place, and experts however they are stored."""

import numpy as np
from safetensors.numpy import load_file

from jspec import hub
from jspec.hub import assemble
from jspec.hub.tensors import stored_tensors
from jspec.model.config import Experts, ModelConfig
from jspec.model.params import param_specs
from tests.hub.checkpoints import copy, edit_config, edit_tensors, message

STACKED = "qwen3_moe_mixed_stacked"
SPARSE = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=3, num_heads=2,
                     num_kv_heads=1, head_dim=2, family="qwen3_moe", qk_norm=True,
                     experts=Experts(3, 2, 5, dense_layers=(1,)))


class Stored:
    """Tensors in memory, as a file has them."""

    label = "memory"

    def __init__(self, tensors):
        self.tensors = tensors

    def rows(self, name, start, stop):
        return self.tensors[name][start:stop]


def test_every_parameter_has_a_stored_name():
    config = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=2,
                         num_heads=2, num_kv_heads=1, head_dim=2, tie_embeddings=False,
                         qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True)
    tensors = stored_tensors(config)
    assert (len({t.name for t in tensors}) == len({t.gguf for t in tensors}) == len(tensors)
            == 3 + 2 * 18)
    assert [t.shape for t in tensors if t.name == "model.layers.1.mlp.down_proj.weight"] == [(4, 6)]


def test_tensors_are_addressed_by_layer_expert_and_half():
    """Each to its own place; along a stack only the layers count that have the parameter."""
    whole = {name: np.random.default_rng(0).random(spec.shape, np.float32)
             for name, spec in param_specs(SPARSE)["layers"].items()}
    for name, array in whole.items():
        stored = [t for t in stored_tensors(SPARSE) if t.key == ("layers", name)]
        assert sum(np.prod(t.shape) for t in stored) == array.size
        source = Stored({t.name: array[t.place] for t in stored})
        np.testing.assert_array_equal(assemble.assemble(source, stored, array.shape, None), array)
    at = {t.name: (t.key[-1], t.place, t.gguf) for t in stored_tensors(SPARSE)}
    assert at["model.layers.2.mlp.experts.1.up_proj.weight"] == (
        "expert_gate_up", (1, 1, 1), "blk.2.ffn_up.1.weight")
    assert at["model.layers.2.mlp.experts.2.gate_proj.weight"][:2] == ("expert_gate_up", (1, 2, 0))
    assert at["model.layers.2.mlp.experts.0.down_proj.weight"][:2] == ("expert_down", (1, 0))
    assert at["model.layers.0.mlp.gate.weight"][:2] == ("router", (0,))
    assert at["model.layers.1.mlp.gate_proj.weight"][:2] == ("gate", (0,))
    assert at["model.layers.2.self_attn.q_proj.weight"][:2] == ("q", (2,))


def test_only_experts_that_a_device_holds_are_read():
    """Of a buffer of the second expert's upper halves, what nobody holds of all others."""
    read = []

    class Watched(Stored):
        def rows(self, name, start, stop):
            read.append(name)
            return super().rows(name, start, stop)

    stored = [t for t in stored_tensors(SPARSE) if t.key[-1] == "expert_gate_up"]
    source = Watched({t.name: np.full(t.shape, i, np.float32) for i, t in enumerate(stored)})
    buffer = np.zeros((2, 1, 1, 5, 4), np.float32)
    for tensor in stored:
        assemble._fill({((0, 2), (1, 2), (1, 2), (0, 5), (0, 4)): buffer}, source, tensor)
    assert read == [f"model.layers.{i}.mlp.experts.1.up_proj.weight" for i in (0, 2)]
    assert sorted(set(buffer.ravel())) == [3, 9]


def test_experts_missing_misshapen_or_stored_twice(tmp_path):
    name = "model.layers.1.mlp.experts.{}"
    directory = edit_tensors(copy(STACKED, tmp_path / "a"),
                             lambda t: t.pop(name.format("down_proj")))
    assert f"tensor {name.format('0.down_proj.weight')} is missing (and 7 more)" in message(
        directory)
    directory = edit_tensors(copy(STACKED, tmp_path / "b"), lambda t: t.update(
        {name.format("gate_up_proj"): t[name.format("gate_up_proj")][:7]}))
    assert (f"tensor {name.format('gate_up_proj')} has shape [7, 24, 16], but the config says "
            "[8, 24, 16]") in message(directory)
    directory = edit_tensors(copy(STACKED, tmp_path / "c"), lambda t: t.update(
        {name.format("3.down_proj.weight"): t[name.format("down_proj")][3]}))
    assert (f"tensor {name.format('3.down_proj.weight')} is stored twice, by itself and in one of "
            "all experts") in message(directory)
    shared = edit_tensors(copy(STACKED, tmp_path / "d"), lambda t: t.update(
        {"model.layers.1.mlp.shared_expert.up_proj.weight": np.ones((2, 2), np.float32)}))
    assert "shared_expert.up_proj.weight has no place in a qwen3_moe model" in message(shared)


def test_more_experts_than_tensors_are_not_even_listed(tmp_path):
    directory = edit_config(copy("qwen3_moe", tmp_path / "m"), num_local_experts=256)
    assert "says 512 experts in all layers, and there are only 69 tensors" in message(directory)
    directory = edit_config(directory, num_hidden_layers=9999)
    assert "the config says 9999 layers, and there are only 69 tensors" in message(directory)


def test_one_by_one_and_stacked_are_the_same_model(tmp_path):
    """What an export of a stacked checkpoint holds, as the file's own experts have it."""
    directory = copy(STACKED, tmp_path / "m")
    stacked = load_file(directory / "model.safetensors")["model.layers.5.mlp.experts.gate_up_proj"]
    policy = hub.load(str(directory))
    hub.export(policy, tmp_path / "out")
    single = load_file(tmp_path / "out" / "model.safetensors")
    for expert in range(8):
        gate, up = (single[f"model.layers.5.mlp.experts.{expert}.{half}_proj.weight"]
                    for half in ("gate", "up"))
        both = np.concatenate([gate, up])
        np.testing.assert_array_equal(both, stacked[expert].astype(np.float32))
    again = hub.load(str(tmp_path / "out"))
    assert again.config == policy.config
