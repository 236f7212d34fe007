"""Make adapters.npz of some golden models: LoRA adapters drawn at random, and the logits that PEFT
gives with them.

    pip install torch transformers peft safetensors numpy
    python tests/golden/make_adapters.py

In each file: `tokens` int32 [1, S] and `logits` float32 [1, S, V]; `config`, the
adapter_config.json; and every tensor of adapter_model.safetensors under its name.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
RANK, ALPHA, STD = 3, 5.0, 0.2
CASES = ("llama", "qwen3_moe")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base",
          "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(TARGETS), "lora_dropout": 0.0,
          "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
          "inference_mode": True}


def drawn(case: str) -> dict[str, np.ndarray]:
    """The two factors of every matrix that the checkpoint has of the targets."""
    rng, out = np.random.default_rng(0), {}
    files = sorted((HERE / case).glob("*.safetensors"))
    stored = {name: x for file in files for name, x in load_file(file).items()}
    for name in sorted(stored):
        if name.split(".")[-2] in TARGETS:
            rows, columns = stored[name].shape
            for half, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                key = f"base_model.model.{name.removesuffix('weight')}{half}.weight"
                out[key] = STD * rng.normal(size=shape).astype(np.float32)
    return out


def main() -> None:
    for case in CASES:
        tensors = drawn(case)
        tokens = np.load(HERE / case / "expected.npz")["tokens"]
        model = AutoModelForCausalLM.from_pretrained(HERE / case, dtype=torch.float32,
                                                     attn_implementation="eager")
        with torch.no_grad():
            before = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "adapter_config.json").write_text(json.dumps(CONFIG))
            save_file(tensors, Path(folder) / "adapter_model.safetensors")
            model = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            logits = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
        print(case, len(tensors), "tensors; the adapters move a logit by up to",
              float(np.abs(logits - before).max()))
        np.savez(HERE / case / "adapters.npz", tokens=tokens.astype(np.int32), logits=logits,
                 config=json.dumps(CONFIG), **tensors)


if __name__ == "__main__":
    main()
