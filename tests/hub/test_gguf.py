"""GGUF files: their tensors and configs equal those of the safetensors they were made from."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from jspec import hub
from jspec.errors import InputError
from jspec.hub.gguf_io import GgufSource, GgufTensor, llama3_rope
from jspec.model.config import RopeConfig
from tests.hub.checkpoints import GOLDEN, write_gguf

YARN = {"{}.rope.scaling.type": "yarn", "{}.rope.scaling.factor": 4.0, "{}.rope.scaling.original_context_length": 16}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.weights, b.weights)


@pytest.mark.parametrize("case", ["llama", "qwen2_tied_sharded", "qwen3"])
def test_gguf_equals_the_safetensors(case, tmp_path):
    policy, want = hub.load(str(write_gguf(case, tmp_path / "model.gguf"))), hub.load(str(GOLDEN / case))
    same(policy, want)
    assert policy.config.stop_tokens == (2,)
    assert policy.config.rms_norm_eps == 1e-6
    config = dataclasses.replace(want.config, stop_tokens=(2,), pad_token=2)
    assert policy.config == config


def test_gguf_biases_and_yarn(tmp_path):
    fields = {k.format("llama"): v for k, v in YARN.items()}
    policy = hub.load(str(write_gguf("llama_yarn_bias", tmp_path / "model.gguf", fields)))
    want = hub.load(str(GOLDEN / "llama_yarn_bias"))
    same(policy, want)
    # the betas are not in a GGUF: llama.cpp has YaRN's own
    assert policy.config.rope == dataclasses.replace(want.config.rope, beta_fast=32.0, beta_slow=1.0)


def test_gguf_quantized_rows_are_those_of_the_dequantized_tensor(tmp_path):
    """Rows are read in pieces; every piece must equal the same rows of the whole."""
    values = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    raw = gguf.quants.quantize(values, kind)
    path = tmp_path / "rows"
    path.write_bytes(b"xyz" + raw.tobytes())
    source = GgufSource("x", path, {"w": GgufTensor(3, kind, (40, 64), raw.shape[1])})
    whole = gguf.quants.dequantize(raw, kind)
    assert np.abs(whole - values).max() < 0.05
    for start, stop in [(0, 40), (7, 8), (13, 39)]:
        np.testing.assert_array_equal(source.rows("w", start, stop), whole[start:stop])


def _llama3_divisors(theta, head_dim, factor, high=4.0, original=8192):
    """rope_freqs.weight as llama.cpp's converter computes it."""
    out = []
    for freq in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / freq
        smooth = (original / wavelength - 1.0) / (high - 1.0)
        inside = original / high <= wavelength <= original
        out.append(1 / ((1 - smooth) / factor + smooth) if inside else 1.0 if wavelength < original / high else factor)
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_divisors(factor):
    rope = llama3_rope(500000.0, 64, _llama3_divisors(500000.0, 64, factor))
    assert rope == RopeConfig(theta=500000.0, scaling="llama3", factor=factor, low_freq_factor=1.0,
                              high_freq_factor=4.0, original_max_position=8192)


def test_bad_gguf_files_are_named(tmp_path):
    whole = write_gguf("llama", tmp_path / "whole.gguf").read_bytes()

    def message(data, name="bad.gguf"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError) as e:
            hub.load(str(path))
        assert str(path) in str(e.value) and "\n" not in str(e.value)
        return str(e.value)

    assert "cut short" in message(whole[:-100])
    assert "cut short" in message(whole[:len(whole) // 8])
    assert "cannot be read as GGUF" in message(b"not a gguf file at all")
    assert "cannot be read as GGUF" in message(b"")


@pytest.mark.parametrize("extra, text", [
    ({"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4), np.float32)}}, "blk.0.ffn_gate_exps.weight has no"),
    ({"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}}, "rope_freqs.weight is not Llama 3's"),
    ({"fields": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope'.* supported: none, linear, yarn"),
    ({"fields": {"split.count": 2}}, "merge the parts"),
    ({"fields": {"llama.expert_count": 8}}, "mixture of experts"),
])
def test_gguf_that_is_not_supported(tmp_path, extra, text):
    path = write_gguf("llama", tmp_path / "model.gguf", extra.get("fields"), extra.get("tensors"))
    with pytest.raises(InputError, match=text):
        hub.load(str(path))


def test_gguf_of_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture 'mamba' is not supported; supported: llama, qwen2, qwen3"):
        hub.load(str(tmp_path / "model.gguf"))
