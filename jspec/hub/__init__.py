"""Names to weights and tokenizers: safetensors in and out, GGUF in. Nothing here ever unpickles.

`open` gives what a name stands for, of which config, tokenizer and policy are read in turn; the
functions beside it are for one of the three.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jspec.hub.download import fetch
from jspec.hub.exporter import export
from jspec.hub.stored import StoredModel, check_loading, open, open_tokenizer
from jspec.hub.tokenizer import character_tokenizer
from jspec.model.config import ModelConfig
from jspec.model.params import Policy

__all__ = ["StoredModel", "character_tokenizer", "export", "fetch", "load", "load_tokenizer",
           "open", "open_tokenizer", "read_config"]


def read_config(name: str | Path) -> ModelConfig:
    """The ModelConfig of a model by name, without its weights (of a hub model only the configs are
    fetched)."""
    return open(name).config


def load(name: str | Path, dtype: str | None = None, mesh: Mesh | None = None) -> Policy:
    """A policy in the training layout: float32 master weights, layers stacked.

    Args:
      name: a short name ("smollm2-135m-instruct"), a hub id ("Qwen/Qwen3-8B"), a directory of
        safetensors with its config.json, or a .gguf file. Experts may be stored one by one or in
        one tensor a layer; `export` writes them one by one. A native MTP head in the directory
        (as MiMo has) is left to `hub.mtp_heads`. Of a tokenizer beside the weights it takes the end
        token and which ids have a token (`ModelConfig.tokenless`).
      dtype: what is computed in, "float32" or "bfloat16" (or the dtype itself); default bfloat16 on
        accelerators, float32 on the CPU.
      mesh: where the weights go, shard by shard; default the mesh of `jax.set_mesh`, else the
        default device.

    Raises InputError if the model is not there, its architecture is not supported, the checkpoint
    is cut short or has a tensor missing, left over or of the wrong shape, or the mesh does not
    divide the model.
    """
    dtype = check_loading(dtype, mesh)  # before anything is looked for
    return open(name).policy(dtype, mesh)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model (any name that `load` takes) with its chat template, or
    "chars:ALPHABET".

    A transformers PreTrainedTokenizerFast: host data, never part of a pytree. Raises InputError if
    there is none.
    """
    return open_tokenizer(name).tokenizer()
