"""A model under a name, opened once: its config, its tokenizer and its weights."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jspec.arguments import compute_dtype, instance, optional
from jspec.hub import vocabulary
from jspec.hub.architectures import config_from_hf
from jspec.hub.assemble import TensorSource, read_weights
from jspec.hub.download import Located, locate
from jspec.hub.json_io import read_json
from jspec.hub.mtp_layouts import mtp_prefixes
from jspec.hub.safetensors_io import open_directory
from jspec.hub.tokenizer import (
    CHARACTERS,
    character_tokenizer,
    tokenizer_from_directory,
    tokenizer_from_gguf,
)
from jspec.model.config import ModelConfig
from jspec.model.params import Policy


def check_loading(dtype: str | None, mesh: Mesh | None) -> str:
    """The name of the dtype that a policy is to compute in. Raises InputError for what is none, and
    for a mesh that is none."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    optional(instance(Mesh, "a mesh, such as jspec.make_mesh(), or None"))("mesh", mesh)
    return compute_dtype("dtype", dtype)


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model by name: of it nothing is read before it is asked for, and weights are fetched last.

    Attributes:
      name: as it was given.
      located: where its files are, see `download.Located`.
    """

    name: str
    located: Located

    @functools.cached_property
    def _header(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from jspec.hub.gguf_io import open_gguf

        return open_gguf(self.located(False))

    @functools.cached_property
    def _gguf(self) -> tuple[TensorSource, ModelConfig, dict[str, Any]]:
        from jspec.hub.gguf_io import gguf_source

        return gguf_source(self.located(False), self._header)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Its shape and what its tokenizer knows (end token, ids without a token), without its
        weights."""
        path = self.located(False)
        if path.is_file():
            _, config, fields = self._gguf
            return vocabulary.with_vocabulary(config, vocabulary.of_gguf(fields))
        generation = read_json(path / "generation_config.json", required=False)
        config = config_from_hf(read_json(path / "config.json"), generation)
        return vocabulary.with_vocabulary(config, vocabulary.of_directory(path))

    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers, with its chat template. Raises InputError if there is
        none."""
        path = self.located(False)
        if path.is_file():
            # there may be one where the weights are not supported
            return tokenizer_from_gguf(self._header[0])
        return tokenizer_from_directory(path)

    def policy(self, dtype: str | None = None, mesh: Mesh | None = None) -> Policy:
        """The policy in the training layout. Arguments and errors are those of `hub.load`."""
        dtype = check_loading(dtype, mesh)
        path = self.located(True)
        config = self.config
        if path.is_file():
            source: TensorSource = self._gguf[0]
        else:
            heads = mtp_prefixes(read_json(path / "config.json"), config)
            source = open_directory(path).without(heads).unstacked(config)
        return Policy(read_weights(source, config, mesh), config, dtype)


@dataclasses.dataclass(frozen=True)
class Characters:
    """A tokenizer of single characters, under the name "chars:ALPHABET"; there is no model behind
    it."""

    alphabet: str

    def tokenizer(self) -> Any:
        """Raises InputError for an empty alphabet or a repeated character."""
        return character_tokenizer(self.alphabet)


def open(name: str | Path) -> StoredModel:
    """The model of a name: see `hub.load`. A hub is asked once, whatever is then read.

    Raises InputError for a name that is unknown.
    """
    return StoredModel(str(name), locate(name))


def open_tokenizer(name: str | Path) -> StoredModel | Characters:
    """What has the tokenizer of a name: see `hub.load_tokenizer`."""
    if isinstance(name, str) and name.startswith(CHARACTERS):
        return Characters(name.removeprefix(CHARACTERS))
    return open(name)
