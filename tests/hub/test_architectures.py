"""Configs to and from the published spelling, and the messages for what is not supported."""

import dataclasses

import pytest

from jspec.errors import InputError
from jspec.hub.architectures import config_from_hf, config_to_hf, end_tokens
from jspec.model.config import Experts, RopeConfig

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128,
         "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "eos_token_id": 2}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MOE = {**LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
       "num_hidden_layers": 6}


def rope(**config):
    return config_from_hf({**LLAMA, "max_position_embeddings": 4096, **config}).rope


def test_defaults_are_those_of_transformers():
    config = config_from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 8, 1e-6)
    assert ((config.tie_embeddings, config.qkv_bias, config.rope)
            == (False, False, RopeConfig(theta=10000.0)))
    assert (config_from_hf(QWEN2).qkv_bias, config_from_hf(QWEN2).out_bias) == (True, False)
    assert (config_from_hf(QWEN3).qk_norm, config_from_hf(QWEN3).head_dim) == (True, 128)
    moe = config_from_hf(MOE)
    assert (moe.qk_norm, moe.head_dim, moe.num_kv_heads) == (True, 8, 4)
    assert moe.experts == Experts(128, 8, 768, renormalize=False)


def test_which_layers_have_experts():
    def dense(**config):
        return config_from_hf({**MOE, **config}).experts.dense_layers

    assert dense(decoder_sparse_step=1, mlp_only_layers=[]) == ()
    assert dense(mlp_only_layers=[4, 0, 77]) == (0, 4)  # what is no layer is none to transformers
    assert dense(decoder_sparse_step=2) == (0, 2, 4)
    assert dense(decoder_sparse_step=3, mlp_only_layers=[2]) == (0, 1, 2, 3, 4)


def test_the_number_of_experts_has_two_names():
    """Publishers' and transformers 5's own."""
    assert config_from_hf({**MOE, "num_experts": 16}).experts.count == 16
    assert config_from_hf({**MOE, "num_local_experts": 32}).experts.count == 32


def test_both_spellings_of_rope_are_the_same():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 512}
    want = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_position=512)
    assert rope(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3}) == want
    assert rope(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3}) == want
    assert rope(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}) == RopeConfig(
        theta=5e5, scaling="linear", factor=2.0)


def test_yarn_defaults():
    config = rope(rope_scaling={"type": "yarn", "original_max_position_embeddings": 1024,
                                "beta_fast": None})
    assert config == RopeConfig(scaling="yarn", factor=4.0, original_max_position=1024)
    # without an original length the scaled one stands for it, as in transformers
    assert rope(rope_scaling={"type": "yarn", "factor": 2.0}).original_max_position == 4096


def test_end_tokens_of_config_and_generation_config_are_united():
    assert config_from_hf(LLAMA, {"eos_token_id": [7, 2, 9]}).stop_tokens == (2, 7, 9)
    assert config_from_hf({**LLAMA, "eos_token_id": None}, None).stop_tokens == ()
    assert end_tokens([1, 1], None, 3) == (1, 3)


def test_padding_token(caplog):
    assert config_from_hf({**LLAMA, "pad_token_id": 5}).pad_token == 5
    assert config_from_hf(LLAMA, {"pad_token_id": 6}).pad_token == 6
    assert config_from_hf({**LLAMA, "pad_token_id": -1}).pad_token == 2
    assert not caplog.text
    size = LLAMA["vocab_size"]
    assert config_from_hf({**LLAMA, "pad_token_id": size}).pad_token == 2
    assert (f"the padding token of config.json, {size}, is no id of the vocabulary of {size}: 2 "
            "takes its place" in caplog.text)


@pytest.mark.parametrize("base", [LLAMA, QWEN2, QWEN3, {
    **MOE, "num_experts": 16, "num_experts_per_tok": 2, "mlp_only_layers": [1],
    "decoder_sparse_step": 2, "norm_topk_prob": True, "moe_intermediate_size": 24}])
@pytest.mark.parametrize("scaling", [
    RopeConfig(theta=1e4), RopeConfig(theta=1e5, scaling="linear", factor=2.0),
    RopeConfig(theta=1e5, scaling="llama3", factor=8.0, low_freq_factor=2.0,
               original_max_position=64),
    RopeConfig(theta=1e5, scaling="yarn", factor=4.0, original_max_position=64, beta_fast=16.0,
               attention_factor=1.25),
    RopeConfig(theta=1e5, scaling="yarn", factor=4.0, original_max_position=64, mscale=1.0,
               mscale_all_dim=0.5, truncate=False)])
def test_config_round_trip(base, scaling):
    config = dataclasses.replace(config_from_hf({**base, "tie_word_embeddings": True},
                                                {"eos_token_id": 9}), rope=scaling, pad_token=3)
    assert config_from_hf(*config_to_hf(config)) == config


def test_a_config_of_no_published_architecture_is_not_exported():
    odd = dataclasses.replace(config_from_hf(LLAMA), qk_norm=True)
    with pytest.raises(InputError, match="no published llama architecture has .*qk_norm=True"):
        config_to_hf(odd)


@pytest.mark.parametrize("changes, text", [
    ({"architectures": ["MixtralForCausalLM"]},
     "architecture MixtralForCausalLM is not supported; "
     "supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"),
    ({"architectures": None}, "model_type 'llama' without an architecture"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}},
     "rope scaling 'dynamic' is not supported; supported: default, linear, llama3, yarn"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
    ({"rope_scaling": {"type": "linear"}}, "has no factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
    ({"hidden_size": "many"}, "has 'many' as hidden_size; expected a positive integer"),
    ({"num_attention_heads": 0}, "has 0 as num_attention_heads; expected a positive integer"),
    ({"rope_scaling": {"type": "yarn", "beta_fast": "x"}},
     "has 'x' as beta_fast; expected a number"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be an integer or a list of them"),
    ({"num_hidden_layers": None}, "has no num_hidden_layers"),
    ({"num_hidden_layers": 10**9}, "has 1000000000 as num_hidden_layers; expected at most 10000"),
    ({"num_key_value_heads": 3}, "config.json has 4 as num_attention_heads, and 3 as "
     "num_key_value_heads; give a multiple of the second as the first"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"architectures": "LlamaForCausalLM"},
     "has 'LlamaForCausalLM' as architectures; expected a list of texts"),
    ({"architectures": [["LlamaForCausalLM"]]}, "as architectures; expected a list of texts"),
    ({"rope_scaling": "yarn"}, "has 'yarn' as rope_scaling; expected an object"),
    ({"rope_parameters": [1]}, "as rope_parameters; expected an object"),
    ({"rope_scaling": {"type": ["yarn"]}}, "rope scaling .'yarn'. is not supported"),
    ({"rope_theta": "1e4"}, "has '1e4' as rope_theta; expected a number"),
    ({"hidden_size": float("inf")}, "has inf as hidden_size; expected a positive integer"),
    ({"hidden_size": float("nan")}, "has nan as hidden_size"),
    ({"hidden_size": 10**400}, "has 1000.*[.][.][.] as hidden_size"),
    ({"rms_norm_eps": 10**400}, "as rms_norm_eps; expected a number"),
    ({"vocab_size": 2**31}, "has 2147483648 as vocab_size"),
    ({"hidden_size": True}, "has True as hidden_size"),
    ({"attention_bias": "false"}, "has 'false' as attention_bias; expected true or false"),
    ({"tie_word_embeddings": 1}, "has 1 as tie_word_embeddings; expected true or false"),
    ({"pad_token_id": "0"}, "has '0' as pad_token_id; expected an integer of at least -1"),
    ({"eos_token_id": True}, "eos_token_id must be an integer or a list of them"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id must be an integer or a list of them"),
    ({"sliding_window": "4096"}, "has '4096' as sliding_window"),
    ({"use_sliding_window": True, "sliding_window": 4, "layer_types": 7}, "has 7 as layer_types"),
])
def test_unsupported_configs_are_named(changes, text):
    with pytest.raises(InputError, match=text):
        config_from_hf({**LLAMA, **changes})


@pytest.mark.parametrize("changes, text", [
    ({"num_experts": 0}, "has 0 as num_experts; expected a positive integer"),
    ({"num_experts": 4}, "experts top_k = 8 is more than the 4 experts of a layer"),
    ({"num_experts": 300}, "experts count = 300 is more than 256"),
    ({"decoder_sparse_step": 0}, "has 0 as decoder_sparse_step; expected a positive integer"),
    ({"decoder_sparse_step": 7}, "experts dense_layers names every layer"),
    ({"mlp_only_layers": 3}, "has 3 as mlp_only_layers; expected a list of whole numbers"),
    ({"mlp_only_layers": [1.5]}, "as mlp_only_layers; expected a list of whole numbers"),
    ({"mlp_only_layers": [True]}, "as mlp_only_layers; expected a list of whole numbers"),
    ({"norm_topk_prob": "yes"}, "has 'yes' as norm_topk_prob; expected true or false"),
    ({"num_hidden_layers": 10**9}, "has 1000000000 as num_hidden_layers; expected at most 10000"),
    ({"shared_expert_intermediate_size": 64},
     "has 64 as shared_expert_intermediate_size: shared experts are no part of Qwen3MoeForCausal"),
    ({"n_shared_experts": 1}, "has 1 as n_shared_experts: shared experts are no part"),
    ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 6},
     "sliding-window attention .window 512. is not supported"),
])
def test_experts_that_are_not_supported_are_named(changes, text):
    with pytest.raises(InputError, match=text):
        config_from_hf({**MOE, **changes})


def test_sliding_windows_matter_only_where_they_are_used():
    window = {**QWEN2, "use_sliding_window": True, "sliding_window": 512,
              "max_position_embeddings": 4096}
    with pytest.raises(InputError, match="sliding-window attention .window 512. is not supported"):
        config_from_hf({**window, "max_window_layers": 1})
    with pytest.raises(InputError, match="sliding-window"):
        config_from_hf({**window, "layer_types": ["full_attention", "sliding_attention"]})
    for unused in ({"max_window_layers": 2}, {"use_sliding_window": False},
                   {"sliding_window": 4096},
                   {"layer_types": ["full_attention"] * 2}, {"sliding_window": None}):
        assert config_from_hf({**window, "max_window_layers": 1, **unused}).family == "qwen2"
