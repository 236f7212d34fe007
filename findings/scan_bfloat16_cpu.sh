#!/usr/bin/env bash
# What:     On a CPU, JAX 0.10.2 makes float32 of a whole stack of bfloat16 matrices before a lax.scan over them, though each
#           step converts only its own: the program needs the stack's float32 size in temporaries, more than if it had been
#           given float32 in the first place. Stacks of float16 and int8 are converted step by step. Gone in 0.12.0.1.
# Matters:  Frozen weights kept in bfloat16 to save memory (LoRA) cost memory: SmolLM2-135M's base 270 MB as arguments, and
#           540 MB of temporaries in the update.
# Instead:  On a CPU keep what is scanned in float32 or int8 (lora.base_dtype; docs/configuration.md says so), or take a
#           newer JAX.
# Output:   jax 0.10.2, a scan over 32 matrices, 33554432 bytes in float32; temporaries:
#           float32 1065028, float16 1065028, int8 1065028, bfloat16 34619460
#           as found
#           It exits with 1 if that has changed.
# Needs:    Python 3.11 or newer, pip, 700 MB in a temporary folder. About a minute.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import sys
import jax
import jax.numpy as jnp

LAYERS, SIZE = 32, 512
whole = LAYERS * SIZE * SIZE * 4


def network(x, stack):
    def layer(x, w):
        return jnp.tanh(x @ w.astype(jnp.float32)), None

    return jax.lax.scan(layer, x, stack)[0]


def temporaries(dtype):
    arguments = (jax.ShapeDtypeStruct((8, SIZE), jnp.float32), jax.ShapeDtypeStruct((LAYERS, SIZE, SIZE), dtype))
    return jax.jit(network).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


found = {dtype: temporaries(dtype) for dtype in ("float32", "float16", "int8", "bfloat16")}
print(f"jax {jax.__version__}, a scan over {LAYERS} matrices, {whole} bytes in float32; temporaries:")
print(", ".join(f"{dtype} {size}" for dtype, size in found.items()))
same = found.pop("bfloat16") >= whole and all(size < whole / 8 for size in found.values())
print("as found" if same else "this has changed")
sys.exit(not same)
PYTHON
