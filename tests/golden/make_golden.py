"""Make the golden models of this directory: tiny random checkpoints with the logits that
transformers gives for them.

    pip install torch transformers safetensors numpy
    python tests/golden/make_golden.py [CASE ...]

Each case becomes a directory as `save_pretrained` writes it, plus expected.npz: tokens int32 [1, S]
and logits float32 [1, S, V] of the float32 eager forward; of a mixture of experts also greedy int32
[T], the tokens of highest logit that follow the first PROMPT of those. smollm2_greedy.json is not
made here: it is the recorded greedy decoding of the embedded SmolLM2-135M-Instruct (tokens,
log-probabilities and the gap to the second-best logit).
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HERE = Path(__file__).parent
LENGTH = 64  # tokens; four times the length before scaling, so that every rope scaling shows
PROMPT = 8
SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=LENGTH, bos_token_id=1)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)

LLAMA, QWEN2, QWEN3 = ((LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config),
                       (Qwen3ForCausalLM, Qwen3Config))
QWEN3_MOE = (Qwen3MoeForCausalLM, Qwen3MoeConfig)
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=12)
# name: (family, config, how it is saved)
CASES = {
    "llama": (LLAMA, dict(eos_token_id=[2, 3],
                          rope_parameters=dict(rope_type="default", rope_theta=500.0)), {}),
    "llama_linear_tied": (LLAMA, dict(tie_word_embeddings=True, rope_parameters=dict(
        rope_type="linear", factor=2.0, rope_theta=10000.0)), dict(old_spelling="type")),
    "llama_llama3_bfloat16": (LLAMA, dict(tie_word_embeddings=True,
                                          rope_parameters=dict(LLAMA3, rope_theta=5000.0)),
                              dict(dtype=torch.bfloat16, old_spelling="rope_type")),
    "llama_yarn_bias": (LLAMA, dict(attention_bias=True, mlp_bias=True, rope_parameters=dict(
        YARN, rope_theta=1000.0, beta_fast=8.0, beta_slow=2.0)), {}),
    "qwen2_tied_sharded": (QWEN2,
                           dict(tie_word_embeddings=True, eos_token_id=5,
                                rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
                           dict(max_shard_size="12KB")),
    "qwen2_yarn": (QWEN2, dict(num_key_value_heads=1, rope_parameters=dict(
        YARN, rope_theta=1000.0, attention_factor=1.3, truncate=False)), dict(old_spelling="type")),
    "qwen3": (QWEN3, dict(num_key_value_heads=4,
                          rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
              dict(dtype=torch.float16)),
    "qwen3_yarn_tied": (QWEN3, dict(tie_word_embeddings=True, rope_parameters=dict(
        YARN, rope_theta=1000.0, mscale=1.0, mscale_all_dim=0.7)), {}),
    "qwen3_moe": (QWEN3_MOE, dict(EXPERTS, norm_topk_prob=True, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0)), dict(max_shard_size="48KB")),
    # sparse are layers 1 and 5; 3 is dense by its number, and the experts of a layer in one tensor
    "qwen3_moe_mixed_stacked": (QWEN3_MOE, dict(
        EXPERTS, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3],
        norm_topk_prob=False, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        dict(dtype=torch.bfloat16, save_original_format=False)),
}


def randomize(model, seed):
    """Weights at which every part matters: attention far from uniform, norms away from 1, biases
    away from 0."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn_like(p)
        p.data = 1 + 0.2 * noise if "norm" in name else 0.3 * noise if p.ndim > 1 else 0.1 * noise


def respell(path, key):
    """Rewrite config.json as transformers 4 did: rope_theta at the top, the scaling in
    rope_scaling."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {key: rope.pop("rope_type"), **rope}
    path.write_text(json.dumps(config, indent=2) + "\n")


def greedy(model, tokens):
    """What follows, token by token, each the one of highest logit, which must stand out."""
    found = torch.from_numpy(tokens).long()
    while found.shape[1] < LENGTH:
        best = model(found).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3
        found = torch.cat([found, best.indices[None, :1]], dim=1)
    return found[0, tokens.shape[1]:].numpy().astype(np.int32)


def make(name, seed):
    (model_class, config_class), changes, saving = CASES[name]
    saving = dict(saving)
    model = model_class(config_class(**{**SIZES, "eos_token_id": 2, **changes})).eval()
    randomize(model, seed)
    spelling, dtype = saving.pop("old_spelling", None), saving.pop("dtype", torch.float32)
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    model.to(dtype).save_pretrained(directory, **saving)
    if spelling:
        respell(directory / "config.json", spelling)
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (1, LENGTH),
                                                  dtype=np.int32)
    # read back, since .to(dtype) rounds the rotary frequencies too
    model = model_class.from_pretrained(directory, dtype=torch.float32,
                                        attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.numpy()
        more = {"greedy": greedy(model, tokens[:, :PROMPT])} if "moe" in name else {}
    np.savez(directory / "expected.npz", tokens=tokens, logits=logits, **more)
    print(f"{name}: logits in [{logits.min():.2f}, {logits.max():.2f}]")


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        if case in (sys.argv[1:] or CASES):
            make(case, number)
