"""Tokenizers: from a directory, from a GGUF's fields, or made of single characters. None of them ever needs torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jspec.errors import InputError

CHARACTERS = "chars:"
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are matched before BPE

# the word splits of llama.cpp's pre-tokenizers, as the models' own tokenizer.json have them
_SPLITS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_PRE_TOKENIZERS = ("smollm", *_SPLITS)


def _fast_class() -> Any:
    """transformers' tokenizer class. Imported late: it costs seconds, and says at import that torch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def tokenizer_from_directory(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory. Raises InputError if it has no tokenizer.json or a corrupt one."""
    if not (directory / "tokenizer.json").exists():
        raise InputError(f"{directory}: no tokenizer.json; save the model's fast tokenizer there (save_pretrained)")
    try:
        return _fast_class().from_pretrained(directory)
    except Exception as e:  # transformers and tokenizers raise anything, bare Exception included, on a bad file
        raise InputError(f"{directory}: the tokenizer cannot be read ({str(e).splitlines()[0]})") from e


def tokenizer_from_gguf(fields: dict[str, Any]) -> Any:
    """The byte-level BPE tokenizer, special tokens and chat template of a GGUF's metadata.

    Raises InputError for another tokenizer model or pre-tokenizer, naming the supported ones.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    prefix = "tokenizer.ggml."
    model, pre = fields.get(prefix + "model"), fields.get(prefix + "pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise InputError(f"GGUF tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; supported: gpt2 with "
                         f"{', '.join(_PRE_TOKENIZERS)}; load the tokenizer from the model's own directory instead")
    tokens, types = fields[prefix + "tokens"], fields.get(prefix + "token_type")
    merges = [tuple(m.split(" ")) for m in fields[prefix + "merges"]]
    vocab = {t: i for i, t in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as e:  # tokenizers raises a bare Exception
        raise InputError(f"the GGUF's tokenizer is corrupt: {e}; fetch the file again") from e
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=kind == _CONTROL, normalized=False)
                          for t, kind in zip(tokens, types or (), strict=False) if kind in (_CONTROL, _USER_DEFINED)])
    named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
             "pad_token": "padding_token_id"}
    special = {k: tokens[fields[prefix + v]] for k, v in named.items() if prefix + v in fields}
    special.setdefault("pad_token", special.get("eos_token"))
    bos = special.get("bos_token")
    if bos and fields.get(prefix + "add_bos_token", False):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, fields[prefix + "bos_token_id"])])
    return _fast_class()(tokenizer_object=tokenizer, chat_template=fields.get("tokenizer.chat_template"),
                         clean_up_tokenization_spaces=False, **special)


def character_tokenizer(alphabet: str) -> Any:
    """One token a character: 0 is padding, 1 ends a text, then the alphabet in its order. No chat template.

    Encoding a character outside the alphabet raises. Raises InputError for an empty alphabet or a repeated character.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise InputError(f"the alphabet {alphabet!r} must have at least one character and none twice")
    vocab = {t: i for i, t in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast_class()(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
