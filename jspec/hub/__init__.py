"""Names to weights and tokenizers: safetensors in and out, GGUF in. Nothing here ever unpickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jspec.arguments import compute_dtype, instance, optional
from jspec.hub import vocabulary
from jspec.hub.architectures import config_from_hf, mtp_prefixes
from jspec.hub.assemble import Source, read_weights
from jspec.hub.download import fetch
from jspec.hub.exporter import export
from jspec.hub.json_io import read_json
from jspec.hub.safetensors_io import open_directory
from jspec.hub.tokenizer import CHARACTERS, character_tokenizer, tokenizer_from_directory, tokenizer_from_gguf
from jspec.model.config import ModelConfig
from jspec.model.params import Policy

__all__ = ["character_tokenizer", "export", "fetch", "load", "load_tokenizer", "read_config"]


def _config(path: Path) -> ModelConfig:
    config = config_from_hf(read_json(path / "config.json"), read_json(path / "generation_config.json", required=False))
    return vocabulary.with_vocabulary(config, vocabulary.of_directory(path))


def _open(path: Path) -> tuple[Source, ModelConfig]:
    if path.is_file():
        from jspec.hub.gguf_io import gguf_source

        source, config, fields = gguf_source(path)
        return source, vocabulary.with_vocabulary(config, vocabulary.of_gguf(fields))
    config = _config(path)
    return open_directory(path).without(mtp_prefixes(read_json(path / "config.json"), config)), config


def read_config(name: str | Path) -> ModelConfig:
    """The ModelConfig of a model by name, without its weights (of a hub model only the configs are fetched)."""
    path = fetch(name, weights=False)
    if path.is_file():
        return _open(path)[1]
    return _config(path)


def load(name: str | Path, dtype: str | None = None, mesh: Mesh | None = None) -> Policy:
    """A policy in the training layout: float32 master weights, layers stacked.

    Args:
      name: a short name ("smollm2-135m-instruct"), a hub id ("Qwen/Qwen3-8B"), a directory of safetensors with its
        config.json, or a .gguf file. A native MTP head in the directory (MiMo's) is left to `hub.mtp_heads`. Of a
        tokenizer beside the weights it takes the end token and which ids have a token (`ModelConfig.tokenless`).
      dtype: what is computed in, "float32" or "bfloat16" (or the dtype itself); default bfloat16 on accelerators,
        float32 on the CPU.
      mesh: where the weights go, shard by shard; default the mesh of `jax.set_mesh`, else the default device.

    Raises InputError if the model is not there, its architecture is not supported, the checkpoint is cut short or has a
    tensor missing, left over or of the wrong shape, or the mesh does not divide the model.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = compute_dtype("dtype", dtype)
    optional(instance(Mesh, "a mesh, such as jspec.make_mesh(), or None"))("mesh", mesh)
    source, config = _open(fetch(name))
    if mesh is None:
        current = jax.sharding.get_mesh()
        mesh = None if current.empty else current
    return Policy(read_weights(source, config, mesh), config, dtype)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model (any name that `load` takes) with its chat template, or "chars:ALPHABET".

    A transformers PreTrainedTokenizerFast: host data, never part of a pytree. Raises InputError if there is none.
    """
    if isinstance(name, str) and name.startswith(CHARACTERS):
        return character_tokenizer(name.removeprefix(CHARACTERS))
    path = fetch(name, weights=False)
    if path.is_file():
        from jspec.hub.gguf_io import open_gguf

        return tokenizer_from_gguf(open_gguf(path)[0])
    return tokenizer_from_directory(path)
