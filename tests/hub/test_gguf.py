"""GGUF files: their tensors and configs equal those of the safetensors they were made from."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from jspec import hub
from jspec.errors import InputError
from jspec.hub.gguf_config import config_from_gguf, llama3_rope
from jspec.hub.gguf_io import GgufSource, GgufTensor
from jspec.model.config import Experts, RopeConfig
from jspec.model.layers import rope_frequencies
from tests.hub.checkpoints import GOLDEN, write_gguf

YARN = {"{}.rope.scaling.type": "yarn", "{}.rope.scaling.factor": 4.0,
        "{}.rope.scaling.original_context_length": 16}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.weights, b.weights)


@pytest.mark.parametrize("case", ["llama", "qwen2_tied_sharded", "qwen3"])
def test_gguf_equals_the_safetensors(case, tmp_path):
    policy, want = (hub.load(str(write_gguf(case, tmp_path / "model.gguf"))),
                    hub.load(str(GOLDEN / case)))
    same(policy, want)
    assert policy.config.stop_tokens == (2,)
    assert policy.config.rms_norm_eps == 1e-6
    config = dataclasses.replace(want.config, stop_tokens=(2,), pad_token=2)
    assert policy.config == config


@pytest.mark.parametrize("case", ["qwen3_moe", "qwen3_moe_mixed_stacked"])
def test_gguf_with_experts(case, tmp_path):
    """Which layers have none, the tensors say; llama.cpp renormalises, and the file has no say."""
    policy = hub.load(str(write_gguf(case, tmp_path / "model.gguf")))
    want = hub.load(str(GOLDEN / case))
    same(policy, want)
    assert (policy.config.experts
            == dataclasses.replace(want.config.experts, renormalize=True))
    assert policy.config == dataclasses.replace(want.config, stop_tokens=(2,), pad_token=2,
                                                experts=policy.config.experts)


def test_gguf_biases_and_yarn(tmp_path):
    fields = {k.format("llama"): v for k, v in YARN.items()}
    policy = hub.load(str(write_gguf("llama_yarn_bias", tmp_path / "model.gguf", fields)))
    want = hub.load(str(GOLDEN / "llama_yarn_bias"))
    same(policy, want)
    # the betas are not in this one, and llama.cpp has YaRN's own
    assert (policy.config.rope
            == dataclasses.replace(want.config.rope, beta_fast=32.0, beta_slow=1.0))
    own = {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0}
    fields |= {f"llama.rope.scaling.{name}": value for name, value in own.items()}
    config = hub.read_config(str(write_gguf("llama_yarn_bias", tmp_path / "whole.gguf", fields)))
    assert config.rope == want.config.rope  # whose logits are those of transformers (test_parity)


BASE = {"general.architecture": "llama", "llama.attention.head_count": 4,
        "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.block_count": 2,
        "llama.context_length": 4096, "llama.attention.layer_norm_rms_epsilon": 1e-5}


def read(factors=None, **scaling):
    fields = {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    return config_from_gguf({**BASE, **fields}, {"token_embd.weight": (64, 32)}, factors)


@pytest.mark.parametrize("scaling, want", [
    (dict(type="yarn", factor=4.0), dict(scaling="yarn", factor=4.0, original_max_position=4096)),
    (dict(type="yarn", factor=4.0, original_context_length=1024, yarn_attn_factor=1.25,
          finetuned=True),
     dict(scaling="yarn", factor=4.0, original_max_position=1024, attention_factor=1.25)),
    (dict(type="yarn", factor=4.0, yarn_ext_factor=-1.0, attn_factor=2.0),
     dict(scaling="yarn", factor=4.0, original_max_position=4096,
          attention_factor=2 * (0.1 * np.log(4) + 1))),
    (dict(type="yarn", factor=4.0, yarn_attn_factor=1.5, attn_factor=2.0),
     dict(scaling="yarn", factor=4.0, original_max_position=4096, attention_factor=3.0)),
    (dict(factor=2.0), dict(scaling="linear", factor=2.0)),  # llama.cpp's default type
    (dict(type="none", factor=2.0), {}), (dict(type="linear", factor=0.0), {}), ({}, {}),
])
def test_the_scaling_of_a_gguf(scaling, want):
    assert read(**scaling).rope == RopeConfig(**want)


@pytest.mark.parametrize("scaling, text", [
    (dict(type="yarn", factor=4.0, yarn_ext_factor=0.5),
     "yarn_ext_factor 0.5 is not supported; supported: 1"),
    (dict(type="yarn", factor=4.0, yarn_log_multiplier=0.1),
     "rope.scaling.yarn_log_multiplier is not supported"),
    (dict(type="linear", factor=2.0, attn_factor=1.2), "attn_factor is supported with yarn only"),
    (dict(type="linear", factor=2.0, yarn_ext_factor=1.0),
     "yarn_ext_factor is supported with yarn only"),
    (dict(attn_factor=2.0, factors=np.full(4, 2, np.float32)),
     "attn_factor is supported with yarn only"),
    (dict(type="longrope", factors=np.full(4, 2, np.float32)),
     "rope scaling 'longrope' of a GGUF is not supported"),
    (dict(type="yarn", factor="4"), "the GGUF has '4' as rope.scaling.factor; expected a number"),
    (dict(type="yarn", factor=4.0, yarn_beta_fast=[8.0]),
     "as rope.scaling.yarn_beta_fast; expected a number"),
    (dict(type=["yarn"]), "rope scaling .'yarn'. of a GGUF is not supported"),
    (dict(type="yarn", factor=4.0, factors=np.full(4, 2, np.float32)), "scales its rope twice"),
])
def test_a_scaling_that_is_not_followed_is_refused(scaling, text):
    with pytest.raises(InputError, match=text):
        read(**scaling)


@pytest.mark.parametrize("changes, text", [
    ({"llama.attention.head_count": [4, 4]},
     "the GGUF has .4, 4. as attention.head_count; expected a positive"),
    ({"llama.attention.head_count": 0}, "the GGUF has 0 as attention.head_count"),
    ({"llama.block_count": None}, "the GGUF has no block_count; expected a positive integer"),
    ({"llama.context_length": "long"}, "has 'long' as context_length"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")},
     "has nan as attention.layer_norm_rms_epsilon"),
    ({"llama.rope.dimension_count": 4}, "rotates 4 of 8 dimensions"),
    ({"llama.attention.sliding_window": 8},
     "sliding-window attention .window 8. of a GGUF is not supported"),
    ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id must be an integer"),
    ({"tokenizer.ggml.padding_token_id": "x"}, "has 'x' as tokenizer.ggml.padding_token_id"),
    ({"general.architecture": 7}, "GGUF architecture 7 is not supported"),
])
def test_metadata_of_the_wrong_type_is_named(changes, text):
    with pytest.raises(InputError, match=text):
        config_from_gguf({**BASE, **changes}, {"token_embd.weight": (64, 32)})


def test_a_gguf_without_an_embedding():
    for shapes in ({}, {"token_embd.weight": (64,)}):
        with pytest.raises(InputError, match="no token_embd.weight of two dimensions"):
            config_from_gguf(BASE, shapes)


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


def test_gguf_quantized_experts_are_read_one_by_one(tmp_path):
    """Of a tensor of all experts each part is at its place, in rows of whole blocks."""
    values = np.random.default_rng(1).normal(size=(3, 8, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    raw = gguf.quants.quantize(values, kind)
    path = tmp_path / "experts"
    path.write_bytes(b"xy" + raw.tobytes())
    stored = GgufTensor(2, kind, (3, 8, 64), raw.shape[-1])
    source = GgufSource("x", path, {str(i): stored.part(i, (8, 64)) for i in range(3)})
    whole = gguf.quants.dequantize(raw, kind)
    for i in range(3):
        np.testing.assert_array_equal(source.rows(str(i), 2, 7), whole[i, 2:7])


MOE = {**{key.replace("llama.", "qwen3moe."): value for key, value in BASE.items()},
       "general.architecture": "qwen3moe", "qwen3moe.expert_count": 8,
       "qwen3moe.expert_used_count": 2}


def test_experts_of_a_gguf_by_its_metadata():
    found = config_from_gguf({**MOE, "qwen3moe.expert_weights_norm": False},
                             {"token_embd.weight": (64, 32), "blk.1.ffn_gate.weight": (48, 32)})
    assert found.experts == Experts(8, 2, 24, renormalize=False, dense_layers=(1,))


@pytest.mark.parametrize("changes, text", [
    ({"expert_count": None}, "the GGUF has no expert_count; expected a positive integer"),
    ({"expert_used_count": 9}, "experts top_k = 9 is more than the 8 experts"),
    ({"expert_shared_count": 1}, "the GGUF has 1 as expert_shared_count, which is not supported"),
    ({"expert_weights_scale": 2.5}, "has 2.5 as expert_weights_scale, which is not supported"),
    ({"expert_gating_func": 2}, "has 2 as expert_gating_func, which is not supported"),
    ({"expert_weights_norm": 1}, "has 1 as expert_weights_norm; expected true or false"),
])
def test_experts_of_a_gguf_that_are_not_supported(changes, text):
    fields = {f"qwen3moe.{key}": value for key, value in changes.items()}
    with pytest.raises(InputError, match=text):
        config_from_gguf({**MOE, **fields}, {"token_embd.weight": (64, 32)})


def _llama3_divisors(theta, head_dim, factor, high=4.0, original=8192):
    """rope_freqs.weight as llama.cpp's converter computes it."""
    out = []
    for freq in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / freq
        smooth = (original / wavelength - 1.0) / (high - 1.0)
        inside = original / high <= wavelength <= original
        out.append(1 / ((1 - smooth) / factor + smooth) if inside else 1.0
                   if wavelength < original / high else factor)
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_divisors(factor):
    rope = llama3_rope(500000.0, 64, _llama3_divisors(500000.0, 64, factor))
    assert rope == RopeConfig(theta=500000.0, scaling="llama3", factor=factor, low_freq_factor=1.0,
                              high_freq_factor=4.0, original_max_position=8192)


@pytest.mark.parametrize("head_dim, original, high", [
    (64, 4096, 4.0), (128, 131072, 4.0), (64, 8192, 2.0), (128, 2048, 8.0), (8, 1024, 4.0),
    (4, 100, 4.0)])
def test_llama3_scaling_of_another_length(head_dim, original, high):
    """Found from the divisors alone; what counts is that the frequencies are those of the model
    that was converted."""
    want = RopeConfig(theta=500000.0, scaling="llama3", factor=8.0, high_freq_factor=high,
                      original_max_position=original)
    divisors = _llama3_divisors(500000.0, head_dim, 8.0, high, original)
    got = llama3_rope(500000.0, head_dim, divisors)
    np.testing.assert_allclose(rope_frequencies(got, head_dim)[0],
                               rope_frequencies(want, head_dim)[0], rtol=1e-4)
    assert head_dim < 64 or (got.original_max_position, got.high_freq_factor) == (original, high)
    assert (llama3_rope(500000.0, head_dim, divisors, original).original_max_position == original
            or high != 4.0)


@pytest.mark.parametrize("divisors",
                         [[1, 2, 3, 4], [1, np.nan, 8, 8], [0, 1, 8, 8], [8, 8, 1, 1], [1, 1, 8]])
def test_divisors_that_are_no_llama3_scaling(divisors):
    with pytest.raises(InputError, match="rope_freqs.weight is not Llama 3's scaling"):
        llama3_rope(500000.0, 8, np.array(divisors, np.float32))


@pytest.mark.parametrize("where", [8, 16])  # how many tensors there are, and how many keys
def test_counts_that_the_file_does_not_hold(tmp_path, where):
    path = write_gguf("llama", tmp_path / "model.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw[:where] + (10**12).to_bytes(8, "little") + raw[where + 8:])
    with pytest.raises(InputError, match="cannot be read as GGUF, it is cut short or corrupt"):
        hub.load(str(path))


def test_an_array_that_the_file_does_not_hold(tmp_path):
    path = write_gguf("llama", tmp_path / "model.gguf", tokenizer=True)
    raw, key = path.read_bytes(), b"tokenizer.ggml.token_type"
    at = raw.index(key) + len(key) + 8  # after the value's type and that of its entries
    path.write_bytes(raw[:at] + (10**12).to_bytes(8, "little") + raw[at + 8:])
    with pytest.raises(InputError, match="its header speaks of more than the file holds"):
        hub.load(str(path))


def test_more_layers_than_tensors(tmp_path):
    path = write_gguf("llama", tmp_path / "model.gguf")
    raw, key = path.read_bytes(), b"llama.block_count"
    at = raw.index(key) + len(key) + 4  # after the value's type
    path.write_bytes(raw[:at] + (10**9).to_bytes(4, "little") + raw[at + 4:])
    with pytest.raises(InputError,
                       match="the config says 1000000000 layers, and there are only 21 tensors"):
        hub.load(str(path))


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
    ({"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4), np.float32)}},
     "blk.0.ffn_gate_exps.weight has no"),
    ({"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}},
     "rope_freqs.weight is not Llama 3's"),
    ({"fields": {"llama.rope.scaling.type": "longrope"}},
     "rope scaling 'longrope'.* supported: none, linear, yarn"),
    ({"fields": {"split.count": 2}}, "merge the parts"),
    ({"fields": {"llama.expert_count": 8}}, "mixture of experts is not supported; supported: qwen"),
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
    with pytest.raises(InputError, match="architecture 'mamba' is not supported; supported: llama, "
                       "qwen2, qwen3"):
        hub.load(str(tmp_path / "model.gguf"))


def test_a_padding_token_that_the_weights_have_no_row_for(caplog):
    config = config_from_gguf({**BASE, "tokenizer.ggml.padding_token_id": 64},
                              {"token_embd.weight": (64, 32)})
    assert config.pad_token == next(iter(config.stop_tokens), 0)
    assert "the padding token of the GGUF, 64, is no id of the vocabulary of 64" in caplog.text
