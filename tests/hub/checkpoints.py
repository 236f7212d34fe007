"""Small checkpoints for the tests of this folder: copies of golden models, and GGUF files written
as llama.cpp does."""

import importlib
import json
import re
import shutil
from functools import partial
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jspec import hub
from jspec.errors import InputError
from jspec.model import train_forward

GOLDEN = Path(__file__).parents[1] / "golden"


def copy(case, target):
    """A golden model's directory that a test may break."""
    shutil.copytree(GOLDEN / case, target)
    return target


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def edit_tensors(directory, change):
    """Apply `change(dict of tensors)` to model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def largest_difference(policy, draft, directory, positions):
    """Between the logits of every depth and those of the reference in a golden directory, where
    there are any: more than so many."""
    module = importlib.import_module(f"jspec.drafts.{draft.name}")  # the package has the function
    with np.load(directory / "reference.npz") as data:
        tokens, want = jnp.asarray(data["tokens"]), data["logits"]

    @jax.jit
    def score(policy, draft):
        trunk = train_forward(policy, tokens, depths=draft.drafter.features(draft.config))
        states = module.unroll(policy, draft, trunk, tokens, len(want))
        head = partial(module.logits, policy, draft.config, draft.weights, draft.state.get("vocab"))
        return jnp.concatenate([head(x) for x in states])

    got = np.asarray(score(policy, draft))
    assert got.shape == want.shape and np.isfinite(want).sum() > positions * want.shape[-1]
    return np.nanmax(np.abs(got - want))


def message(directory):
    """What loading a model that is broken says, in one line."""
    with pytest.raises(InputError) as e:
        hub.load(str(directory))
    assert "\n" not in str(e.value)
    return str(e.value)


def one_by_one(tensors):
    """Those of all experts of a layer, as today's transformers has them, as publishers do."""
    out = {}
    for name, value in tensors.items():
        at = name.rpartition(".experts.")[0]
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = np.split(both, 2)
                out[f"{at}.experts.{expert}.gate_proj.weight"] = gate
                out[f"{at}.experts.{expert}.up_proj.weight"] = up
        elif name.endswith(".experts.down_proj"):
            for expert, down in enumerate(value):
                out[f"{at}.experts.{expert}.down_proj.weight"] = down
        else:
            out[name] = value
    return out


def _stacked(tensors):
    """Those of single experts as llama.cpp's converter puts them together, in order."""
    out, experts = {}, {}
    for name, value in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if found:
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = value
        else:
            out[name] = value
    return out | {name: np.stack([own[i] for i in sorted(own)]) for name, own in experts.items()}


def _permute(weights, heads):
    """llama.cpp's convert_hf_to_gguf.py: LlamaModel.permute."""
    return (weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
            .swapaxes(1, 2).reshape(weights.shape))


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name):
    top = {"model.embed_tokens.weight": "token_embd.weight",
           "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.{kind}"


def write_gguf(case, path, fields=None, extra_tensors=None, tokenizer=False):
    """The golden model `case` as llama.cpp's converter would write it: vectors float32, matrices as
    stored, experts one below the other."""
    directory = GOLDEN / case
    config = json.loads((directory / "config.json").read_text())
    arch, heads, kv_heads = (config["model_type"].replace("_", ""), config["num_attention_heads"],
                             config["num_key_value_heads"])
    rope = (config.get("rope_parameters")
            or {**config["rope_scaling"], "rope_theta": config["rope_theta"]})
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_eos_token_id(2)
    if arch == "qwen3moe":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    for key, value in (fields or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(
            value, float) else writer.add_uint32
        add(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "<|end|>", "ab"])
        writer.add_token_types([1, 1, 3, 1])
        writer.add_token_merges(["a b"])
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors.update(load_file(file))
    for name, value in _stacked(one_by_one(tensors)).items():
        if arch == "llama" and ".q_proj" in name or arch == "llama" and ".k_proj" in name:
            value = _permute(value, heads if ".q_proj" in name else kv_heads)
        as_is = value.ndim > 1 and value.dtype in (np.float32, np.float16)
        writer.add_tensor(_gguf_name(name), value if as_is else value.astype(np.float32))
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
