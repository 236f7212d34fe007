"""Tokenizers: from a directory, from a GGUF's fields, or made of single characters. None of them
ever needs torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from jspec.errors import InputError
from jspec.hub.vocabulary import gguf_vocabulary

CHARACTERS, FAST = "chars:", "PreTrainedTokenizerFast"
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are matched before BPE

# the word splits of llama.cpp's pre-tokenizers, as the models' own tokenizer.json have them
_SPLITS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_PRE_TOKENIZERS = ("smollm", *_SPLITS)
# of these, those with which llama.cpp begins a text with its begin token unless told not to
_BEGINS = ("llama-bpe",)


def transformers_class(name: str) -> Any:
    """A class of transformers. Imported late: it costs seconds, and says at import that torch is
    missing. Raises InputError if it cannot be imported."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import transformers  # noqa: F401

        # it puts another module in its place when its import ends, and a thread that waited for
        # that is given the first one, which has no classes
        return getattr(sys.modules["transformers"], name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"transformers cannot be imported ({_reason(error)}); install it "
                         "again") from error


def _reason(error: Exception) -> str:
    """The first line of what a library said, with its kind: a KeyError says only the key."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def tokenizer_from_directory(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory. Raises InputError if it has no tokenizer.json or a
    corrupt one."""
    if not (directory / "tokenizer.json").exists():
        raise InputError(f"{directory}: no tokenizer.json; save the model's fast tokenizer there "
                         "(save_pretrained)")
    for path in directory.iterdir():
        # a pipe would be waited for without end
        if path.suffix in (".json", ".jinja") and not path.is_file():
            raise InputError(f"{path}: not a file; {path.name} must be one")
    made_by = transformers_class(FAST)
    try:
        return made_by.from_pretrained(directory)
    except Exception as e:
        # transformers and tokenizers raise anything, bare Exception included, on a bad file
        raise InputError(f"{directory}: the tokenizer cannot be read ({_reason(e)})") from e


def tokenizer_from_gguf(fields: dict[str, Any]) -> Any:
    """The byte-level BPE tokenizer, special tokens and chat template of a GGUF's metadata.

    Entries that only fill the vocabulary up are no tokens. Raises InputError for another tokenizer
    model or pre-tokenizer, naming the supported ones, and for fields that are no tokenizer's.
    """
    prefix = "tokenizer.ggml."
    model, pre = fields.get(prefix + "model"), fields.get(prefix + "pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise InputError(f"GGUF tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; "
                         f"supported: gpt2 with {', '.join(_PRE_TOKENIZERS)}; load the tokenizer "
                         "from the model's own directory instead")
    made_by = transformers_class(FAST)
    try:
        return _byte_level_bpe(made_by, pre, fields.get("tokenizer.chat_template"), {
            name.removeprefix(prefix): value for name, value in fields.items()})
    except Exception as e:
        # tokenizers raises a bare Exception, and fields may be missing or of any type
        raise InputError(f"the GGUF's tokenizer is corrupt: {_reason(e)}; fetch the file "
                         "again") from e


def _byte_level_bpe(made_by: Any, pre: str, chat_template: str | None,
                    fields: dict[str, Any]) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokens, types = fields["tokens"], fields.get("token_type")
    merges = [tuple(m.split(" ")) for m in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=gguf_vocabulary(tokens, types), merges=merges,
                                     ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=kind == _CONTROL, normalized=False)
                          for t, kind in zip(tokens, types or (),
                                             strict=False) if kind in (_CONTROL, _USER_DEFINED)])
    named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id",
             "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
    special = {k: tokens[fields[v]] for k, v in named.items() if v in fields}
    special.setdefault("pad_token", special.get("eos_token"))
    bos = special.get("bos_token")
    if bos and fields.get("add_bos_token", pre in _BEGINS):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1",
            special_tokens=[(bos, fields["bos_token_id"])])
    return made_by(tokenizer_object=tokenizer, chat_template=chat_template,
                   clean_up_tokenization_spaces=False, **special)


def character_tokenizer(alphabet: str) -> Any:
    """One token a character: 0 is padding, 1 ends a text, then the alphabet in its order. No chat
    template.

    Encoding a character outside the alphabet raises. Raises InputError for an empty alphabet or a
    repeated character.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise InputError(f"the alphabet {alphabet!r} must have at least one character and none "
                         "twice")
    vocab = {t: i for i, t in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers_class(FAST)(tokenizer_object=tokenizer, pad_token="<pad>",
                                    eos_token="<end>")
