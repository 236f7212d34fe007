#!/usr/bin/env bash
# What:     The converter of speculators 0.9.0 (SpecForge's layout of an EAGLE-3 draft to its own) keeps every shape and
#           ends with success, but leaves out what decides what the draft computes: `norm_before_residual` and the
#           auxiliary layers that config.json names are not read (only its own arguments are), the tensor of
#           `norm_before_fc` (input_norm.weight) is not written although the flag is, and a sliding window is dropped. A
#           warning among its log lines names the tensor, nothing the rest.
# Matters:  The converted draft loads everywhere and drafts from other layers, without its norm: it is accepted far less
#           often, and nothing says why.
# Instead:  Give the converter the flags and layers as arguments, or write that layout directly
#           (`jspec draft export MODEL DRAFT DIR --layout speculators`).
# Output:   speculators 0.9.0
#           norm_before_residual: asked for True, converted False
#           norm_before_fc: asked for True, converted True
#           eagle_aux_hidden_state_layer_ids: asked for [1, 4, 7], converted None
#           sliding_window: asked for 8, converted None
#           input_norm.weight is not there
#           as found
#           It exits with 1 if that has changed.
# Needs:    Python 3.11 or newer, pip, 2 GB in a temporary folder. About three minutes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 transformers==5.19.0 speculators==0.9.0 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }
"$work/venv/bin/python" - "$work" 2>"$work/log" <<'PYTHON' || { tail -5 "$work/log"; exit 1; }
import json, sys
from importlib.metadata import version
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from speculators.convert.eagle.eagle3_converter import Eagle3Converter

work, D, V = Path(sys.argv[1]), 16, 32
policy, draft, out = work / "policy", work / "draft", work / "converted"
policy.mkdir(), draft.mkdir()
(policy / "config.json").write_text(json.dumps(dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=V, hidden_size=D, num_hidden_layers=8,
    num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64)))
asked = dict(norm_before_residual=True, norm_before_fc=True, eagle_aux_hidden_state_layer_ids=[1, 4, 7],
             layer_types=["sliding_attention"], sliding_window=8)
(draft / "config.json").write_text(json.dumps(dict(
    architectures=["LlamaForCausalLMEagle3"], model_type="llama", vocab_size=V, draft_vocab_size=V, hidden_size=D,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24,
    max_position_embeddings=64, rms_norm_eps=1e-5, **asked)))
shapes = {"fc": (D, 3 * D), "input_norm": (3 * D,), "norm": (D,), "lm_head": (V, D), "embed_tokens": (V, D),
          "midlayer.hidden_norm": (D,), "midlayer.input_layernorm": (D,), "midlayer.post_attention_layernorm": (D,),
          "midlayer.self_attn.q_proj": (16, 2 * D), "midlayer.self_attn.k_proj": (8, 2 * D),
          "midlayer.self_attn.v_proj": (8, 2 * D), "midlayer.self_attn.o_proj": (D, 16),
          "midlayer.mlp.gate_proj": (24, D), "midlayer.mlp.up_proj": (24, D), "midlayer.mlp.down_proj": (D, 24)}
save_file({f"{name}.weight": torch.rand(shape) for name, shape in shapes.items()}, draft / "model.safetensors")
Eagle3Converter().convert(draft, out, str(policy), validate=False)
made, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
layer = made["transformer_layer_config"]
got = dict(norm_before_residual=made.get("norm_before_residual"), norm_before_fc=made.get("norm_before_fc"),
           eagle_aux_hidden_state_layer_ids=made.get("eagle_aux_hidden_state_layer_ids"),
           sliding_window=layer.get("sliding_window"))
print("speculators", version("speculators"))
for name, value in got.items():
    print(f"{name}: asked for {asked[name]}, converted {value}")
print("input_norm.weight is", "there" if "input_norm.weight" in tensors else "not there")
found = dict(norm_before_residual=False, norm_before_fc=True, eagle_aux_hidden_state_layer_ids=None, sliding_window=None)
same = got == found and "input_norm.weight" not in tensors
print("as found" if same else "changed")
sys.exit(not same)
PYTHON
