"""The shapes of published models, by the names that a config gives: nothing is fetched, no weights
are there."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jspec import arguments, hub
from jspec.base_model import architecture
from jspec.config import Config
from jspec.errors import InputError
from jspec.heads.models import NAME as DRAFT_MODEL
from jspec.heads.models import open_model
from jspec.hub.architectures import config_from_hf
from jspec.hub.names import SHORT_NAMES, PackagedModel
from jspec.model import ModelConfig
from jspec.sections import ModelSection

TABLE = Path(__file__).with_name("published.json")
PADDED = 512
"""By how many ids vocabularies of one tokenizer differ at most: Qwen2.5's by 128."""


@functools.cache
def published() -> Mapping[str, Mapping[str, Any]]:
    """By hub id: `config`, what its config.json says of its shape, and `parameters`."""
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: entry for name, entry in found.items() if name != "source"}


def shape_of(section: ModelSection, path: str | None = None) -> ModelConfig:
    """The model of a configuration's section `model`, without weights and tokenizer.

    path: of a config.json that says it instead. Where there is none it is the table's, or what is
    in a folder, a .gguf file or the hub's cache. Raises InputError where nothing says it, with what
    would.
    """
    if path is not None:
        return _of_file(arguments.path("--model", path))
    if section.name == "random":
        return architecture(section)
    if (known := _in_table(section.name)) is not None:
        return known
    try:
        return hub.read_config(section.name)
    except InputError as error:
        raise InputError(
            f"{error}; or give its shape, --model path/to/config.json (known without: "
            f"{', '.join(published())})"
        ) from None


def subject(config: Config, path: str | None = None) -> tuple[Config, ModelConfig]:
    """(the configuration, its model as `shape_of` has it). A draft model at `draft.path` becomes
    one of its shape, drawn at random, that learns if the other did: it may be in the table too.

    Of both vocabularies some ids may have no token; no tokenizer says which. Those of the policy's
    that a draft model of the same tokenizer lacks are taken to be.
    """
    model, section = shape_of(config.model, path), config.draft
    if section.name != DRAFT_MODEL or section.path is None:
        return config, model
    name = section.path
    small = _in_table(name) or open_model(name).config
    if not model.tokenless and 0 < model.vocab_size - small.vocab_size <= PADDED:
        model = dataclasses.replace(model, tokenless=((small.vocab_size, model.vocab_size),))
    draft = dataclasses.replace(section, path=None, options={"model": small}, train=section.trains)
    return dataclasses.replace(config, draft=draft), model


def _in_table(name: str) -> ModelConfig | None:
    known = SHORT_NAMES.get(name, name)
    if isinstance(known, PackagedModel):
        known = "HuggingFaceTB/SmolLM2-135M-Instruct"
    if known not in published():
        return None
    return config_from_hf(dict(published()[known]["config"]))


def _of_file(path: Path) -> ModelConfig:
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--model {path} cannot be read: {error.strerror}; name a published "
                         "model's config.json") from None
    except ValueError:
        raise InputError(f"--model {path} cannot be read: it is not JSON; name a published "
                         "model's config.json") from None
    if not isinstance(fields, dict):
        raise InputError(f"--model {path} is no config.json: it holds no object")
    try:
        return config_from_hf(fields)
    except InputError as error:
        raise InputError(f"--model {path}: {error}") from None
