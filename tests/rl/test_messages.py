import json

import pytest

from jspec.errors import InputError
from jspec.hub.tokenizer import character_tokenizer
from jspec.learning_sections import DataSection
from jspec.rl import chat
from jspec.rl.encode import encode_prompt
from jspec.rl.prompts import PromptData
from jspec.rl.records import load_records, read_jsonl

USER, SYSTEM, ANSWER = ({"role": role, "content": text} for role, text in (
    ("user", "2 + 2"), ("system", "Be brief."), ("assistant", "4")))


class Chat:
    """A tokenizer of one token a character, with a chat template."""

    chat_template = "a template"

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@pytest.fixture(autouse=True)
def proved(monkeypatch):
    monkeypatch.setattr(chat, "ends", lambda *arguments: True)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("messages, system, expected", [
    ([USER], None, "<user>2 + 2"),
    ([USER], "Think.", "<system>Think.<user>2 + 2"),
    ([SYSTEM, USER], "Think.", "<system>Be brief.<user>2 + 2"),
    ([USER, ANSWER, USER], None, "<user>2 + 2<assistant>4<user>2 + 2"),
])
def test_what_the_policy_reads(tmp_path, messages, system, expected):
    path = write(tmp_path / "a.jsonl", {"messages": messages, "answer": 4, "level": 1})
    data = PromptData(DataSection(source=str(path), prompts_per_step=1, system_prompt=system),
                      Chat(), seed=0)
    (prompt,) = next(data)
    assert "".join(map(chr, prompt.tokens)) == expected
    assert prompt.text == "2 + 2" and prompt.meta == {"level": 1} and prompt.answer == "4"
    assert "".join(f"<{m['role']}>{m['content']}" for m in prompt.messages) == expected
    assert prompt.is_chat


def test_without_a_chat_template():
    tokenizer = character_tokenizer("Bbeirf.\n 2+4")
    assert tokenizer.decode(encode_prompt(tokenizer, [SYSTEM, USER])) == "Be brief.\n\n2 + 2"
    with pytest.raises(InputError, match="messages of the role 'assistant', and without a chat"):
        encode_prompt(tokenizer, [USER, ANSWER, USER])


@pytest.mark.parametrize("prompt, message", [
    ([], "bad.jsonl:2: the prompt is empty"),
    ([{"role": "user", "content": " "}], "bad.jsonl:2: the prompt is empty"),
    ([USER, ANSWER], "bad.jsonl:2: 'prompt' ends with a message of the assistant"),
    ([USER, {"role": "user"}], "'prompt' is not a string, but list, and its number 2 is no mess"),
    ([{"role": "user", "content": ["a"]}], "its number 1 is no message, {role, content} of two"),
    ("2 + 2", "bad.jsonl:2: the prompt is a text, and .*bad.jsonl:1 has messages; write all of"),
])
def test_what_is_no_prompt(tmp_path, prompt, message):
    path = write(tmp_path / "bad.jsonl", {"prompt": [USER], "answer": "4"},
                 {"prompt": prompt, "answer": "4"})
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


def test_other_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "a", "gold": 0.10, "prompt": "?", "n": 1})
    section = DataSection(source=str(path), prompt_column="question", answer_column="gold")
    assert list(load_records(section, seed=0)) == [{"prompt": "a", "answer": "0.1", "n": 1}]
    without = DataSection(source=str(path), answer_column=None, prompts_per_step=1)
    (prompt,) = next(PromptData(without, Chat(), seed=0))
    assert (prompt.text, prompt.answer) == ("?", "")


def test_equal_messages_are_on_one_side_of_held_out(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": str(n % 4)}], "answer": str(n)}
            for n in range(8)]
    section = DataSection(source=str(write(tmp_path / "a.jsonl", *rows)), held_out=1)
    sides = [[record["prompt"][0]["content"] for record in load_records(section, 0, held_out=side)]
             for side in (False, True)]
    assert [len(side) for side in sides] == [6, 1] and not {*sides[0]} & {*sides[1]}
