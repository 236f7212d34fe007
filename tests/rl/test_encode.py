import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jspec.errors import InputError
from jspec.hub.tokenizer import character_tokenizer
from jspec.rl import chat
from jspec.rl.encode import encode_prompt, encode_prompts

WORDS = ["<s>", "</s>", "user", "a", "b", "<unk>", "system"]
CHAT = "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def proved(request, monkeypatch):
    """Templates are taken to end, where that is not what a test is about: it costs a second to
    see."""
    if (request.function not in (test_a_template_without_end_is_refused,
                                 test_a_template_is_proved_once)):
        monkeypatch.setattr(chat, "ends", lambda *arguments: True)


class Characters:
    """A tokenizer of one token a character, and a begin token."""

    def __call__(self, texts, add_special_tokens=True):
        begin = [1] if add_special_tokens else []
        return {"input_ids": [begin + [ord(character) for character in text] for text in texts]}


class Chat(Characters):
    """The same with a chat template."""

    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert add_generation_prompt and not tokenize
        return ("".join(f"<{message['role']}>{message['content']}" for message in messages)
                + "<assistant>")


def make(single, template=None):
    """A tokenizer of words that adds special tokens as `single` says."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)},
                                       unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single=single,
                                                         special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize(
    "tokenizer, system, template, expected",
    [
        (Chat(), None, True, "<user>2 + 2<assistant>"),
        (Chat(), "Be brief.", True, "<system>Be brief.<user>2 + 2<assistant>"),
        (Chat(), None, False, "\x012 + 2"),
        (Characters(), None, True, "\x012 + 2"),
        (Characters(), "Be brief.", True, "\x01Be brief.\n\n2 + 2"),
    ],
)
def test_rendering(tokenizer, system, template, expected):
    assert "".join(map(chr, encode_prompt(tokenizer, "2 + 2", system, template))) == expected


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_plain_text_has_one_begin_token_and_no_end_token(single):
    begin = [0] if "<s>" in single else []
    assert (encode_prompts(make(single), ["a b", "<s> b", "b </s>"])
            == [begin + [3, 4], [0, 4], begin + [4, 1]])
    assert encode_prompt(make(single, CHAT), "a b", chat_template=False) == begin + [3, 4]
    assert encode_prompt(make(single), "b", system_prompt="a a") == begin + [3, 3, 4]


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_a_chat_has_the_special_tokens_that_its_template_writes(single):
    assert encode_prompt(make(single, CHAT), "a b") == [0, 2, 3, 4]
    assert encode_prompt(make(single, CHAT), "a b", system_prompt="b") == [0, 6, 4, 2, 3, 4]


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(InputError,
                       match="cannot encode the prompt 'ab7': '7' is not in its alphabet 'abc'"):
        encode_prompt(character_tokenizer("abc"), "ab7")


def test_what_is_refused_by_a_template():
    with pytest.raises(InputError, match="cannot encode the prompt 'a': one at a time"):
        encode_prompt(make("$A", "{{ raise_exception('one\nat a time') }}"), "a")


@pytest.mark.parametrize("template", [LOOPS, "{{ 'x' * 1048577 }}", "{{ 'x' * 10**10 }}"])
def test_a_template_without_end_is_refused(template, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    with pytest.raises(InputError, match="chat template does not end: a short message took more "
                       "than .*mend the temp"):
        encode_prompt(make("$A", template), "a")


def test_a_template_is_proved_once():
    chat.ends.cache_clear()
    tokenizer = make("$A", CHAT)
    encode_prompts(tokenizer, ["a", "b"])
    encode_prompts(tokenizer, ["b"])
    assert chat.ends.cache_info().misses == 1
