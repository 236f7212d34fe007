"""Which ids a tokenizer has a token for, and which one ends a text: what a policy has to know of
its tokenizer.

Read from the files themselves: making the tokenizer would import transformers, which costs more
than a small model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jspec.errors import InputError
from jspec.hub.architectures import end_tokens
from jspec.hub.json_io import read_json
from jspec.model.config import ModelConfig

# llama.cpp's token type of what fills a vocabulary up; older converters have only its name, [PADid]
_UNUSED = 5


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """ids: int64 [n], that the tokenizer has tokens for. end: its end token, None if it has
    none."""

    ids: np.ndarray
    end: int | None


def with_vocabulary(config: ModelConfig, vocabulary: Vocabulary | None) -> ModelConfig:
    """A policy's config with its tokenizer's end token among the stop tokens, as vLLM has it (chat
    models whose configs name only the end of a text are common), and `tokenless` as the tokenizer
    has it. None: nothing is known."""
    if vocabulary is None:
        return config
    end = (vocabulary.end if vocabulary.end is not None and 0 <= vocabulary.end < config.vocab_size
           else None)
    stop = end_tokens(config.stop_tokens, end)
    ids = np.unique(np.concatenate([vocabulary.ids, np.asarray(stop, np.int64)]))
    ids = np.concatenate([[-1], ids[(ids >= 0) & (ids < config.vocab_size)], [config.vocab_size]])
    before = np.flatnonzero(np.diff(ids) > 1)
    gaps = tuple(zip((ids[before] + 1).tolist(), ids[before + 1].tolist(), strict=True))
    return dataclasses.replace(config, stop_tokens=stop, tokenless=gaps)


def of_tokenizer(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a transformers tokenizer."""
    return Vocabulary(np.fromiter(tokenizer.get_vocab().values(), np.int64), tokenizer.eos_token_id)


def of_gguf(fields: dict[str, Any]) -> Vocabulary | None:
    """The vocabulary in a GGUF's metadata, None if there is none in it. Its end tokens are the
    config's already."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    return Vocabulary(np.array(list(gguf_vocabulary(tokens, fields.get("tokenizer.ggml.token_type"))
                                    .values()), np.int64), None)


def gguf_vocabulary(tokens: list[str], types: list[int] | None) -> dict[str, int]:
    """The tokens of a GGUF with their ids, without those that only fill the vocabulary up."""
    kinds = types or [0] * len(tokens)
    return {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind != _UNUSED and token != f"[PAD{i}]"}


def of_directory(directory: Path) -> Vocabulary | None:
    """The vocabulary of the tokenizer files in a model's directory, None if it has no
    tokenizer.json.

    Raises InputError for files that are no tokenizer's.
    """
    tokenizer = read_json(directory / "tokenizer.json", required=False)
    if tokenizer is None:
        return None
    settings = read_json(directory / "tokenizer_config.json", required=False) or {}
    special = read_json(directory / "special_tokens_map.json", required=False) or {}
    try:
        known = tokenizer["model"]["vocab"]  # a list of (token, score) in unigram models
        known = (dict(known) if isinstance(known, dict)
                 else {token: i for i, (token, _) in enumerate(known)})
        known |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        known |= {token["content"]: int(i)
                  for i, token in (settings.get("added_tokens_decoder") or {}).items()}
        end = settings.get("eos_token") or special.get("eos_token")
        end = known.get(end["content"] if isinstance(end, dict) else end)
        ids = np.array(list(known.values()))
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError("ids that are no whole numbers")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f"{directory}: tokenizer.json and what is beside it are no tokenizer's "
                         f"({type(e).__name__}: {e}); fetch them again") from None
    return Vocabulary(ids, end)
