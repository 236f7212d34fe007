import dataclasses
import itertools
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest

from jspec.config import DataSection
from jspec.errors import InputError
from jspec.rl.prompts import ARITHMETIC, PromptData, encode_prompt, read_jsonl


class Characters:
    """A tokenizer of one token a character, without a chat template."""

    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return ([1] if add_special_tokens else []) + [ord(character) for character in text]


class Chat(Characters):
    """The same with a chat template."""

    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert add_generation_prompt and not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def section(path, **changes):
    return dataclasses.replace(DataSection(source=str(path), prompts_per_step=4), **changes)


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "answer": n, "half": n / 2}) + "\n" for n in range(10)))
    return path


def texts(data, steps):
    return [[prompt.text for prompt in step] for step in itertools.islice(data, steps)]


def test_a_prompt_has_text_tokens_answer_and_the_rest(numbers):
    data = PromptData(section(numbers, shuffle=False), Characters(), seed=0)
    prompt = next(data)[3]
    assert (prompt.text, prompt.tokens, prompt.answer, prompt.meta) == ("3", (1, ord("3")), "3", {"half": 1.5})


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


def test_without_shuffling_the_files_order_repeats(numbers):
    assert texts(PromptData(section(numbers, shuffle=False), Characters(), seed=0), 3) == [
        list("0123"), list("4567"), list("8901")
    ]


def test_shuffled_epochs_hold_every_prompt_once_and_differ(numbers):
    stream = sum(texts(PromptData(section(numbers), Characters(), seed=0), 5), [])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list("0123456789")
    assert stream[:10] != stream[10:]


def test_the_seed_decides_the_order(numbers):
    first, again, other = (PromptData(section(numbers), Characters(), seed=seed) for seed in (7, 7, 8))
    one, two, three = texts(first, 8), texts(again, 8), texts(other, 8)
    assert one == two != three
    flat, late = sum(one, []), sum(three, [])
    assert flat[10:20] != late[:10]  # run 8 is not run 7 one epoch later


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_restored_equals_uninterrupted(numbers, steps):
    data = PromptData(section(numbers), Characters(), seed=3)
    texts(data, steps)
    state = json.loads(json.dumps(data.state()))
    rest = texts(data, 6)
    resumed = PromptData(section(numbers), Characters(), seed=3)
    texts(resumed, 2)  # where it stood before does not matter
    resumed.restore(state)
    assert texts(resumed, 6) == rest


@pytest.mark.parametrize(
    "seed, changes, line",
    [
        (4, {}, ""),
        (3, {"prompts_per_step": 2}, ""),
        (3, {"shuffle": False}, ""),
        (3, {}, '{"prompt": "10", "answer": "10"}'),
    ],
)
def test_a_position_in_other_prompts_is_refused(numbers, seed, changes, line):
    state = PromptData(section(numbers), Characters(), seed=3).state()
    numbers.write_text(numbers.read_text() + line)
    data = PromptData(section(numbers, **changes), Characters(), seed)
    with pytest.raises(InputError, match="data position belongs to other prompts .* choose another output_dir"):
        data.restore(state)


def test_processes_share_each_step_and_resume_in_another_number(numbers):
    one = PromptData(section(numbers), Characters(), seed=1)
    both = [PromptData(section(numbers), Characters(), 1, index, 2) for index in range(2)]
    whole, halves = texts(one, 6), [texts(half, 6) for half in both]
    assert [left + right for left, right in zip(*halves, strict=True)] == whole
    assert both[0].state() == both[1].state() == one.state()
    ids = [half.sequence_ids(group_size=3) for half in both]
    np.testing.assert_array_equal(np.concatenate(ids), one.sequence_ids(3))
    np.testing.assert_array_equal(one.sequence_ids(3), np.arange(12))
    assert ids[0].dtype == np.int32


def test_steps_that_the_processes_cannot_share(numbers):
    with pytest.raises(InputError, match="prompts_per_step=4 cannot be shared by 3 processes; make it a multiple of 3"):
        PromptData(section(numbers), Characters(), 0, 0, 3)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'prompt': 1}", r"bad.jsonl:2: not JSON \(Expecting property name .* at column 2\)"),
        ('["a", "b"]', r"bad.jsonl:2: not an object of .*, but list"),
        ('{"question": "a", "answer": "b"}', r"bad.jsonl:2: no 'prompt' \(it has 'question', 'answer'\)"),
        ('{"prompt": "a"}', r"bad.jsonl:2: no 'answer' \(it has 'prompt'\)"),
        ("{}", r"bad.jsonl:2: no 'prompt' \(it has no keys\)"),
        ('{"prompt": "a", "answer": null}', "bad.jsonl:2: 'answer' is not a string, but NoneType"),
        ('{"prompt": "a", "answer": true}', "bad.jsonl:2: 'answer' is not a string, but bool"),
        ('{"prompt": ["a"], "answer": "b"}', "bad.jsonl:2: 'prompt' is not a string, but list"),
        ('{"prompt": " ", "answer": "b"}', "bad.jsonl:2: the prompt is empty"),
        ('{"prompt": "a", "answer": "b", "response": "c"}', "bad.jsonl:2: the key 'response' is taken"),
        ('{"prompt": "a", "answer": "b", "finished": 1}', "bad.jsonl:2: the key 'finished' is taken"),
        ('{"prompt": "a", "answer": "b", "length": 3}', "bad.jsonl:2: the key 'length' is taken"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        PromptData(section(path), Characters(), seed=0)


def test_other_line_ends_inside_a_string_are_no_line_ends(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes('{"prompt": "a\u2028b", "answer": "c"}\r\n\n{"prompt": "d", "answer": "e"}'.encode())
    assert [record["prompt"] for record in read_jsonl(path)] == ["a\u2028b", "d"]


def test_a_file_without_prompts(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InputError, match="empty.jsonl holds no prompts; it needs lines of"):
        PromptData(section(path), Characters(), seed=0)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot read the prompts .*gone.jsonl: No such file .*; check data.source"):
        PromptData(section(tmp_path / "gone.jsonl"), Characters(), seed=0)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "binary.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read the prompts .*binary.jsonl: it is not UTF-8 text"):
        PromptData(section(path), Characters(), seed=0)


def test_a_source_that_is_none():
    with pytest.raises(InputError, match="'gsm8k' is none of 'arithmetic', a .jsonl file, 'reasoning_gym:TASK'"):
        PromptData(DataSection(source="gsm8k"), Characters(), seed=0)


def test_options_are_for_tasks(numbers):
    with pytest.raises(InputError, match="data.options are for reasoning_gym tasks; .* takes none"):
        PromptData(section(numbers, options={"size": 3}), Characters(), seed=0)


def test_a_prompt_over_the_limit_is_named_at_once(tmp_path):
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": "short", "answer": ""}] * 50 + [{"prompt": "x" * 100, "answer": ""}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=r"the prompt 'x{57}\.\.\.' has 101 tokens, over data.max_prompt_tokens=100"):
        PromptData(section(path, max_prompt_tokens=100), Characters(), seed=0)
    assert PromptData(section(path, max_prompt_tokens=101), Characters(), seed=0)


def test_a_prompt_over_the_limit_by_its_tokens_is_named_when_drawn(tmp_path):
    class Bytes(Characters):
        def encode(self, text, add_special_tokens=True):
            return list(text.encode())

    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "abcdef", "answer": ""}\n{"prompt": "ééééé", "answer": ""}', encoding="utf-8")
    data = PromptData(section(path, max_prompt_tokens=9), Bytes(), seed=0)
    with pytest.raises(InputError, match="the prompt 'ééééé' has 10 tokens"):
        next(data)


def test_a_prompt_that_the_tokenizer_refuses(numbers):
    from jspec.hub.tokenizer import character_tokenizer

    with pytest.raises(InputError, match="the tokenizer cannot encode the prompt '0': "):
        PromptData(section(numbers), character_tokenizer("abc"), seed=0)


def test_the_shipped_arithmetic_is_right_and_what_its_script_makes():
    records = PromptData(DataSection(), Chat(), seed=0).records
    made = subprocess.run([sys.executable, ARITHMETIC.with_name("make_arithmetic.py")], capture_output=True, check=True)
    assert made.stdout == ARITHMETIC.read_bytes()
    for record in records:
        left, sign, right = re.search(r"(\d) ([+-]) (\d)", record["prompt"]).groups()
        assert int(record["answer"]) == int(left) + (1 if sign == "+" else -1) * int(right)
    assert len({record["prompt"] for record in records}) == len(records) == 279


# reasoning_gym is an optional extra: the tests below drive a stand-in with its interface, and the real one if it is
# there.


@dataclasses.dataclass
class Task:
    seed: int
    size: int
    limit: int = 10

    def __post_init__(self):
        assert self.limit > 0, "limit must be positive"

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        value = (self.seed * 31 + number) % self.limit
        return {"question": f"Say {value}", "answer": None if value == 0 else value, "metadata": {"value": value}}

    def score_answer(self, answer, entry):
        return 1.0 if answer == str(entry["metadata"]["value"]) else 0.25


@pytest.fixture
def gym(monkeypatch):
    module = types.ModuleType("reasoning_gym")
    module.factory = types.SimpleNamespace(DATASETS={"say": Task, "chain_sum": Task})
    module.create_dataset = lambda name, **options: Task(**options)
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_reasoning_gym_questions(gym):
    config = DataSection(source="reasoning_gym:say", options={"size": 5, "limit": 4}, shuffle=False)
    data = PromptData(config, Characters(), seed=9)
    assert len(data.records) == 5
    prompt = next(data)[1]
    assert (prompt.text, prompt.answer) == ("Say 0", "")
    assert prompt.meta["task"] == "say" and prompt.meta["options"] == {"size": 5, "seed": 9, "limit": 4}
    assert prompt.meta["entry"]["metadata"] == {"value": 0}
    assert texts(PromptData(config, Characters(), seed=10), 1) != texts(PromptData(config, Characters(), seed=9), 1)


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("chainsum", {}, "reasoning_gym has no task 'chainsum'; did you mean 'chain_sum'?"),
        ("say", {"depth": 3}, "task 'say' refuses data.options=.*'depth'"),
        ("say", {"limit": 0}, "task 'say' refuses data.options=.*limit must be positive"),
        ("say", {"size": 0}, "data.options.size=0 leaves 'say' without questions"),
    ],
)
def test_reasoning_gym_mistakes(gym, task, options, message):
    with pytest.raises(InputError, match=message):
        PromptData(DataSection(source=f"reasoning_gym:{task}", options=options), Characters(), seed=0)


def test_reasoning_gym_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"reasoning_gym is not installed .* pip install 'jspec\[tasks\]'"):
        PromptData(DataSection(source="reasoning_gym:chain_sum"), Characters(), seed=0)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_the_real_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    config = DataSection(source="reasoning_gym:chain_sum", options={"size": 20, "max_terms": 3})
    one, two = (PromptData(config, Characters(), seed=5) for _ in range(2))
    first = [next(one) for _ in range(4)]
    assert first == [next(two) for _ in range(4)]
    from jspec.rl.rewards import reasoning_gym

    prompt = first[0][0]
    assert reasoning_gym(prompt.text, f"<answer>{prompt.answer}</answer>", prompt.answer, **prompt.meta) == 1.0
    assert reasoning_gym(prompt.text, "no idea", prompt.answer, **prompt.meta) < 0.5
