"""The shapes of published models, by the names that a config gives: nothing is fetched, no weights
are there."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jspec import arguments, hub
from jspec.base_model import architecture
from jspec.errors import InputError
from jspec.hub.architectures import config_from_hf
from jspec.hub.names import SHORT_NAMES, PackagedModel
from jspec.model import ModelConfig
from jspec.sections import ModelSection

TABLE = Path(__file__).with_name("published.json")


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
    name = SHORT_NAMES.get(section.name, section.name)
    if isinstance(name, PackagedModel):
        name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    if name in published():
        return config_from_hf(dict(published()[name]["config"]))
    try:
        return hub.read_config(section.name)
    except InputError as error:
        raise InputError(
            f"{error}; or give its shape, --model path/to/config.json (known without: "
            f"{', '.join(published())})"
        ) from None


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
