"""What a policy knows of its tokenizer, wherever it stands: the end token, and which ids have no
token."""

import dataclasses
import json
import sys

import numpy as np
import pytest

import jspec
from jspec import hub
from jspec.base_model import BaseModel
from jspec.config import load_config
from jspec.errors import InputError
from jspec.hub import vocabulary
from jspec.hub.vocabulary import Vocabulary, of_directory, of_tokenizer, with_vocabulary
from jspec.prepare import ends
from tests.hub.checkpoints import GOLDEN, copy, write_gguf
from tests.speculate import tiny

LETTERS = {letter: i for i, letter in enumerate("abcdefgh")}


def tokenizer_files(directory, vocab=LETTERS, added=((20, "<x>"),), decoder=((22, "<|im_end|>"),),
                    eos="<|im_end|>"):
    (directory / "tokenizer.json").write_text(json.dumps({
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "added_tokens": [{"id": i, "content": text} for i, text in added]}))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": eos,
        "added_tokens_decoder": {str(i): {"content": text} for i, text in decoder}}))
    return directory


def test_a_directory_says_which_ids_have_a_token_and_which_ends_a_text(tmp_path):
    directory = tokenizer_files(copy("llama", tmp_path / "m"))
    config = jspec.load(str(directory)).config
    plain = hub.read_config(str(GOLDEN / "llama"))
    # with no tokenizer beside it nothing is known
    assert plain.tokenless == () and plain.stop_tokens == (2, 3)
    assert (config == dataclasses.replace(plain, stop_tokens=(2, 3, 22),
                                          tokenless=((8, 20), (21, 22), (23, 48))))
    assert hub.read_config(str(directory)) == config


@pytest.mark.parametrize("eos, special, end", [
    ("<x>", None, 20), ({"content": "b", "lstrip": False}, None, 1),
    (None, {"eos_token": "<|im_end|>"}, 22), (None, None, None), ("not there", None, None)])
def test_where_an_end_token_may_stand(tmp_path, eos, special, end):
    tokenizer_files(tmp_path, eos=eos)
    if special:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert of_directory(tmp_path).end == end


def test_a_unigram_vocabulary_is_a_list(tmp_path):
    tokenizer_files(tmp_path, vocab=[["a", -1.5], ["b", -2.5]], decoder=(), eos="b")
    found = of_directory(tmp_path)
    assert sorted(found.ids) == [0, 1, 20] and found.end == 1


def test_nothing_of_transformers_is_imported_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails from here on
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert (hub.read_config(str(tokenizer_files(copy("llama", tmp_path / "m")))).stop_tokens
            == (2, 3, 22))


@pytest.mark.parametrize("name, text", [
    ("tokenizer.json", '{"model": {}}'), ("tokenizer.json", '{"model": 3}'),
    ("tokenizer.json", "[]"), ("tokenizer.json", '{"model": {"vocab": [1]}}'),
    ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}'),
    ("tokenizer.json", '{"model": {"vocab": {"a": 1.5}}}'),
    ("tokenizer_config.json", '{"eos_token": [1]}'),
    ("tokenizer.json", '{"model": {"vocab": {"a": 1}}, "added_tokens": [3]}'),
    ("tokenizer.json", '{"model": {"vocab": {"a": 123456789012345678901234567890}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
    ("special_tokens_map.json", "3"), ("tokenizer_config.json", '{"added_tokens_decoder": [1]}')])
def test_files_that_are_no_tokenizers_are_one_line(tmp_path, name, text):
    directory = tokenizer_files(copy("llama", tmp_path / "m"), eos=None)
    (directory / name).write_text(text)
    with pytest.raises(InputError, match="tokenizer|special_tokens_map") as e:
        hub.read_config(str(directory))
    assert "\n" not in str(e.value) and str(directory) in str(e.value)


def test_ranges_of_ids():
    config = tiny.config(151_936)
    qwen = with_vocabulary(config, Vocabulary(np.arange(151_665), 151_645))
    assert qwen.tokenless == ((151_665, 151_936),) and qwen.stop_tokens == (151_645,)
    config = tiny.config(9, stop_tokens=(6,))
    for ids, end, stops, tokenless in (
            (range(9), 6, (6,), ()), (range(30), None, (6,), ()),
            ([3], 99, (6,), ((0, 3), (4, 6), (7, 9))),
            # an end token is one, whatever its tokenizer says
            ([0, 1, 8], 0, (6, 0), ((2, 6), (7, 8)))):
        got = with_vocabulary(config, Vocabulary(np.array(ids), end))
        assert (got.stop_tokens, got.tokenless) == (stops, tokenless)
    assert with_vocabulary(config, None) == config


def test_a_gguf_marks_what_only_fills_its_vocabulary_up(tmp_path):
    fields = {"tokenizer.ggml.tokens": ["a", "[PAD1]", "b", "[PAD7]", "c", "<|end|>"],
              "tokenizer.ggml.token_type": [1, 4, 1, 1, 5, 3]}
    assert vocabulary.of_gguf(fields).ids.tolist() == [0, 2, 3, 5]
    assert vocabulary.of_gguf({"tokenizer.ggml.tokens": ["a", "b"]}).ids.tolist() == [0, 1]
    assert vocabulary.of_gguf({}) is None
    policy = jspec.load(str(write_gguf("llama", tmp_path / "model.gguf", tokenizer=True)))
    assert policy.config.tokenless == ((4, 48),)
    assert (set(hub.load_tokenizer(str(tmp_path / "model.gguf")).get_vocab().values())
            == {0, 1, 2, 3})


def test_a_run_takes_both_from_its_own_tokenizer(tmp_path):
    hub.export(hub.load(str(GOLDEN / "llama")), tmp_path / "m", hub.character_tokenizer("0123"))
    config = load_config(None,
                         [f"model.name={tmp_path / 'm'}", "model.tokenizer='chars:0123456789'"])
    base = BaseModel.of(config)
    tokenizer, policy = base.tokenizer, base.policy().config
    assert policy.stop_tokens == (2, 3, 1) and policy.tokenless == ((12, 48),)
    assert with_vocabulary(hub.read_config(str(tmp_path / "m")), of_tokenizer(tokenizer)) == policy
    assert (ends(config, policy, tokenizer)
            == "answers end with 0, 1, <end>, 36 ids without a token are never sampled")
    whole = dataclasses.replace(policy, stop_tokens=(40,), tokenless=())
    assert ends(config, whole, tokenizer) == "answers end with 40"
    config = load_config(None, [f"model.name={tmp_path / 'm'}", "sampling.stop_tokens=[]"])
    assert ends(config, whole, tokenizer) == "nothing but the cap ends an answer"
