"""Make the golden MiMo models of this directory: tiny random checkpoints with a native MTP head,
and its logits.

    pip install torch transformers safetensors numpy
    python tests/golden/make_mimo.py [CASE ...]

Each case becomes a directory in MiMo's layout: a Qwen2 trunk and `model.mtp_layers.0.*`.
expected.npz holds tokens int32 [1, S]; logits float32 [1, S, V] of the trunk, as transformers'
Qwen2 gives them; depth1 float32 [S - 1, V], the head's logits for the token that follows the first
2 .. S tokens; and depth2 float32 [S - 2, V], for the token that follows the first 3 .. S of them
where the last one was drafted: the head reads its own state in the trunk's place.

The head is written down here from MiMo's published modelling code (the block) and its authors'
serving code (what the block is given): pair i is the trunk's state at token i, before the final
norm, with the embedding of token i + 1. float64, and of nothing of jspec.
"""

import json
import shutil
import sys

import numpy as np
import torch
from make_golden import HERE, SIZES, randomize
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

LENGTH = 20
PREFIX = "model.mtp_layers.0."
CONFIG = {**SIZES, "architectures": ["MiMoForCausalLM"], "model_type": "mimo",
          "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 2, "hidden_act": "silu",
          "initializer_range": 0.02, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-5,
          "rope_theta": 500.0, "sliding_window": 64, "tie_word_embeddings": False,
          "use_cache": True, "use_mrope": False, "use_sliding_window": False}
# name: (changes of the config, dtype, files)
CASES = {"mimo": ({}, torch.float32, 1),
         "mimo_bfloat16_sharded": ({"num_key_value_heads": 1, "rope_theta": 20.0}, torch.bfloat16,
                                   2)}


def head_shapes(c):
    d, f, q, kv = (c["hidden_size"], c["intermediate_size"],
                   c["num_attention_heads"] * c["head_dim"],
                   c["num_key_value_heads"] * c["head_dim"])
    norms = ["token_layernorm", "hidden_layernorm", "input_layernorm", "post_attention_layernorm",
             "final_layernorm"]
    return {**{f"{name}.weight": (d,) for name in norms}, "input_proj.weight": (d, 2 * d),
            "self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d), "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (d, q), "mlp.gate_proj.weight": (f, d),
            "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}


class Head(torch.nn.Module):
    """Only names and shapes, so that `randomize` fills them as it fills the trunk's."""

    def __init__(self, config):
        super().__init__()
        self.tensors = {name: torch.nn.Parameter(torch.empty(shape))
                        for name, shape in head_shapes(config).items()}

    def named_parameters(self):
        return self.tensors.items()


def norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotary(x, theta):
    """x [n, heads, d] at positions 0 .. n - 1, first half of the dimensions against the second."""
    n, _, d = x.shape
    angle = (torch.arange(n, dtype=x.dtype)[:, None]
             / theta ** (torch.arange(0, d, 2, dtype=x.dtype) / d))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :d // 2], x[..., d // 2:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def head(w, c, hidden, embeddings):
    """States [n, D] of n pairs of a hidden state and the embedding of the token after it."""
    eps, (heads, kv, d) = c["rms_norm_eps"], (c[k] for k in ("num_attention_heads",
                                                             "num_key_value_heads", "head_dim"))
    n = len(hidden)
    pairs = torch.cat([norm(hidden, w["hidden_layernorm.weight"], eps),
                       norm(embeddings, w["token_layernorm.weight"], eps)], -1)
    x = pairs @ w["input_proj.weight"].T
    y = norm(x, w["input_layernorm.weight"], eps)
    q, k, v = ((y @ w[f"self_attn.{s}_proj.weight"].T + w[f"self_attn.{s}_proj.bias"])
               .view(n, -1, d) for s in "qkv")
    q, k = rotary(q, c["rope_theta"]), rotary(k, c["rope_theta"])
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    out = []
    for i in range(heads):
        j = i // (heads // kv)
        scores = (q[:, i] @ k[:, j].T / d ** 0.5).masked_fill(future, -torch.inf)
        out.append(scores.softmax(-1) @ v[:, j])
    x = x + torch.cat(out, -1) @ w["self_attn.o_proj.weight"].T
    y = norm(x, w["post_attention_layernorm.weight"], eps)
    gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
    x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T
    return norm(x, w["final_layernorm.weight"], eps)


def depths(w, c, hidden, tokens):
    """(depth1 [S - 1, V], depth2 [S - 2, V]) from the trunk's states [S, D] and tokens [S]."""
    own = {name.removeprefix(PREFIX): x for name, x in w.items() if name.startswith(PREFIX)}
    embeddings = w["model.embed_tokens.weight"][tokens]
    first = head(own, c, hidden[:-1], embeddings[1:])
    second = []
    for n in range(2, len(tokens)):  # token n is drafted
        pairs = torch.cat([hidden[:n - 1], first[n - 2][None]]), embeddings[1:n + 1]
        second.append(head(own, c, *pairs)[-1])
    return first @ w["lm_head.weight"].T, torch.stack(second) @ w["lm_head.weight"].T


def save(directory, tensors, files):
    names = sorted(tensors)
    if files == 1:
        return save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    placed = {name: f"model-{i * files // len(names) + 1:05d}-of-{files:05d}.safetensors"
              for i, name in enumerate(names)}
    for file in sorted(set(placed.values())):
        save_file({n: tensors[n] for n in names if placed[n] == file}, directory / file,
                  metadata={"format": "pt"})
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": placed}, indent=2) + "\n")


def make(name, seed):
    changes, dtype, files = CASES[name]
    c = {**CONFIG, **changes, "torch_dtype": str(dtype).removeprefix("torch.")}
    qwen = Qwen2Config(**{k: v for k, v in c.items() if k not in ("model_type", "architectures",
                                                                  "torch_dtype")})
    model, extra = Qwen2ForCausalLM(qwen).eval(), Head(c)
    randomize(model, seed)
    randomize(extra, seed + 1)
    tensors = {**model.state_dict(), **{PREFIX + n: p.data for n, p in extra.named_parameters()}}
    tensors = {n: x.detach().to(dtype).contiguous() for n, x in tensors.items()}
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(c, indent=2) + "\n")
    save(directory, tensors, files)
    stored = {n: x for file in directory.glob("*.safetensors") for n, x in load_file(file).items()}
    model.load_state_dict({n: x.float() for n, x in stored.items() if not n.startswith(PREFIX)})
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, c["vocab_size"],
                                                                   (1, LENGTH))).long()
    seen = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
        one, two = depths({n: x.double() for n, x in stored.items()}, c, seen[0][0].double(),
                          tokens[0])
    np.savez(directory / "expected.npz", tokens=tokens.int().numpy(), logits=logits,
             depth1=one.float().numpy(), depth2=two.float().numpy())
    print(f"{name}: logits in [{logits.min():.2f}, {logits.max():.2f}], depth 1 in "
          f"[{one.min():.2f}, {one.max():.2f}]")


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        if case in (sys.argv[1:] or CASES):
            make(case, 100 + number)
