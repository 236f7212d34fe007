"""Tokenizers against recorded ids, and the single-character one."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jspec import hub
from jspec.errors import InputError
from jspec.hub.tokenizer import tokenizer_from_gguf, transformers_class
from tests.hub.checkpoints import GOLDEN

RECORDED = json.loads((GOLDEN / "smollm2_greedy.json").read_text())


@pytest.mark.parametrize("entry", RECORDED, ids=[e["prompt"][:12] for e in RECORDED])
def test_smollm2_gives_the_recorded_ids_and_text(smollm2_tokenizer, entry):
    chat = [{"role": "user", "content": entry["prompt"]}]
    assert (smollm2_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            == entry["rendered"])
    assert smollm2_tokenizer(entry["rendered"]).input_ids == entry["prompt_tokens"]
    assert smollm2_tokenizer.decode(entry["greedy_tokens"]) == entry["text"]


def test_smollm2_special_tokens_and_digits(smollm2_tokenizer, smollm2):
    assert smollm2_tokenizer.eos_token_id in smollm2.config.stop_tokens
    assert smollm2_tokenizer.pad_token_id == smollm2.config.pad_token
    assert len(smollm2_tokenizer) == smollm2.config.vocab_size
    assert len(smollm2_tokenizer("12345").input_ids) == 5  # each digit for itself
    text = "Naïve café — 東京\n\n  def f(x):\n\treturn x**2 🙂"
    assert smollm2_tokenizer.decode(smollm2_tokenizer(text).input_ids) == text
    text = "<|im_start|>user\nhi<|im_end|>"
    assert (smollm2_tokenizer.decode(smollm2_tokenizer(text).input_ids, skip_special_tokens=True)
            == "user\nhi")


def _fields(**changes):
    letters = ["a", "b", "ab", "1", "11", "Ġ", "Ġa", "<|x|>", "<|end|>"]
    base = {"model": "gpt2", "pre": "qwen2", "tokens": letters,
            "token_type": [1, 1, 1, 1, 1, 1, 1, 4, 3],
            "merges": ["a b", "1 1", "Ġ a"], "eos_token_id": 8}
    return {f"tokenizer.ggml.{k}": v for k, v in {**base, **changes}.items()}


@pytest.mark.parametrize("pre, ids",
                         [("qwen2", [2, 6, 3, 3, 3, 7, 8]), ("llama-bpe", [2, 6, 4, 3, 7, 8]),
                          ("smollm", [2, 6, 3, 3, 3, 7, 8])])
def test_pre_tokenizers_split_as_llama_cpp_does(pre, ids):
    tokenizer = tokenizer_from_gguf(_fields(pre=pre))
    assert tokenizer("ab a111<|x|><|end|>").input_ids == ids
    # user-defined tokens are text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab a111<|x|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 8


def test_a_begin_token_is_added_where_the_file_says_so():
    assert (tokenizer_from_gguf(_fields(bos_token_id=7, add_bos_token=True))("ab").input_ids
            == [7, 2])
    assert tokenizer_from_gguf(_fields(bos_token_id=7, add_bos_token=False))("ab").input_ids == [2]


@pytest.mark.parametrize("pre, begins", [("llama-bpe", True), ("qwen2", False), ("smollm", False)])
def test_a_begin_token_is_added_where_llama_cpp_adds_one_by_default(pre, begins):
    said_nothing = _fields(pre=pre, bos_token_id=7)
    assert tokenizer_from_gguf(said_nothing)("ab").input_ids == ([7, 2] if begins else [2])
    against = {**said_nothing, "tokenizer.ggml.add_bos_token": not begins}
    assert tokenizer_from_gguf(against)("ab").input_ids == ([2] if begins else [7, 2])


def test_a_corrupt_gguf_tokenizer():
    for broken in ({"merges": ["a x"]}, {"merges": [3]}, {"merges": ["ab"]}, {"tokens": 3},
                   {"eos_token_id": 99}, {"token_type": [1]}, {"eos_token_id": "x"},
                   {"tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9]}):
        with pytest.raises(InputError, match="tokenizer is corrupt: .*; fetch the file again"):
            tokenizer_from_gguf(_fields(**broken))
    without = _fields()
    del without["tokenizer.ggml.merges"]
    with pytest.raises(InputError,
                       match="tokenizer is corrupt: KeyError: 'merges'; fetch the file again"):
        tokenizer_from_gguf(without)


def test_a_transformers_that_cannot_be_imported_is_no_corrupt_file(monkeypatch, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for read in (lambda: tokenizer_from_gguf(_fields()), lambda: hub.load_tokenizer(str(tmp_path)),
                 lambda: hub.character_tokenizer("01")):
        with pytest.raises(InputError, match="^transformers cannot be imported .*install it again"):
            read()


SWAPPED = """\
import sys, time, types
time.sleep(0.2)
own = types.ModuleType(__name__)
own.Named = "found"
own.__spec__ = __spec__
sys.modules[__name__] = own
"""


def test_two_threads_may_import_transformers_at_once(monkeypatch, tmp_path):
    """It puts another module in its place when its import ends, as this one does."""
    (tmp_path / "transformers.py").write_text(SWAPPED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    del sys.modules["transformers"]  # and afterwards what was there comes back
    with ThreadPoolExecutor() as pool:
        first = pool.submit(transformers_class, "Named")
        while "transformers" not in sys.modules:
            time.sleep(1e-3)
        assert (transformers_class("Named"), first.result()) == ("found", "found")


@pytest.mark.parametrize("changes", [{"pre": "deepseek-coder"}, {"model": "llama", "pre": None}])
def test_another_gguf_tokenizer_is_named(changes):
    with pytest.raises(InputError,
                       match="is not supported; supported: gpt2 with smollm, qwen2, llama-bpe"):
        tokenizer_from_gguf(_fields(**changes))


def test_character_tokenizer():
    tokenizer = hub.load_tokenizer("chars:0123456789 +=\n")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 16)
    assert tokenizer("1 + 2=\n").input_ids == [3, 12, 13, 12, 4, 14, 15]
    assert tokenizer.decode([3, 12, 13, 12, 4, 1, 0, 0], skip_special_tokens=True) == "1 + 2"
    assert tokenizer.chat_template is None
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer("x")
    for alphabet in ("", "aba"):
        with pytest.raises(InputError, match="at least one character and none twice"):
            hub.load_tokenizer("chars:" + alphabet)


def test_a_directory_without_a_tokenizer_or_with_a_broken_one(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json"):
        hub.load_tokenizer(str(GOLDEN / "llama"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        hub.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    os.mkfifo(tmp_path / "chat_template.jinja")  # a pipe would be waited for without end
    with pytest.raises(InputError, match="chat_template.jinja: not a file"):
        hub.load_tokenizer(str(tmp_path))
