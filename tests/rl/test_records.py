import os
import re
import subprocess
import sys

import pytest

from jspec.errors import InputError
from jspec.hub import character_tokenizer
from jspec.learning_sections import DataSection
from jspec.rl.prompts import PromptData
from jspec.rl.records import ARITHMETIC, LONGEST_LINE, load_records, parse_line, read_jsonl
from jspec.rl.rewards import answer_check


@pytest.mark.parametrize("line, message", [
    ("{'prompt': 1}", r"bad.jsonl:2: not valid JSON \(Expecting property name .* column 2"),
    ('["a", "b"]', r"bad.jsonl:2: not a JSON object, but list"),
    ("[" * 100_000, "bad.jsonl:2: not valid JSON .*nested more than"),
    ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "bad.jsonl:2: not valid JSON .*5000 digits"),
    ('{"prompt": "\\ud800", "answer": "b"}', "bad.jsonl:2: not valid JSON .*surrogates"),
    ('{"prompt": "a", "answer": NaN}', "bad.jsonl:2: not valid JSON .*NaN"),
    ('{"question": "a", "answer": "b"}',
     r"bad.jsonl:2: no 'prompt' \(it has 'question', 'answer'\)"),
    ('{"prompt": "a"}', r"bad.jsonl:2: no 'answer' \(it has 'prompt'\)"),
    ("{}", r"bad.jsonl:2: no 'prompt' \(it has no keys\)"),
    ('{"prompt": "a", "answer": null}', "bad.jsonl:2: 'answer' is not a string, but NoneType"),
    ('{"prompt": "a", "answer": true}', "bad.jsonl:2: 'answer' is not a string, but bool"),
    ('{"prompt": ["a"], "answer": "b"}', "bad.jsonl:2: 'prompt' is not a string, but list"),
    ('{"prompt": " ", "answer": "b"}', "bad.jsonl:2: the prompt is empty"),
    ('{"prompt": "a", "answer": "b", "response": "c"}', "bad.jsonl:2: the key 'response' is taken"),
    ('{"prompt": "a", "answer": "b", "finished": 1}', "bad.jsonl:2: the key 'finished' is taken"),
    ('{"prompt": "a", "answer": "b", "length": 3}', "bad.jsonl:2: the key 'length' is taken"),
    (b"\xff\xfe\x00",
     "cannot read the prompts .*bad.jsonl:2: it is not UTF-8 text; check data.source"),
    (b" " * (LONGEST_LINE + 1),
     "bad.jsonl:2: longer than 16777216 bytes; end every record with a line end"),
],
                         )
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n'
                     + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(InputError, match=message) as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value)


def test_other_line_ends_inside_a_string_are_no_line_ends(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes('{"prompt": "a\u2028b", "answer": "c"}\r\n'
                     '\n{"prompt": "d", "answer": "e"}'.encode())
    records = read_jsonl(path)
    assert [record["prompt"] for record in records] == ["a\u2028b", "d"]
    assert [records.where(number) for number in range(2)] == [f"{path}:1", f"{path}:3"]


def test_a_file_without_prompts(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InputError, match="empty.jsonl holds no prompts; it needs lines of"):
        read_jsonl(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "folder.jsonl"):
        with pytest.raises(InputError, match=f"cannot read the prompts .*{name}: it is not a file; "
                           "check data.source"):
            read_jsonl(tmp_path / name)
    with pytest.raises(InputError, match="cannot read the prompts .*gone.jsonl: No such file .*; "
                       "check data.source"):
        read_jsonl(tmp_path / "gone.jsonl")


def test_a_source_that_is_none():
    with pytest.raises(InputError, match="'gsm8k' is none of 'arithmetic', a .jsonl file, "
                       "'reasoning_gym:TASK'"):
        load_records(DataSection(source="gsm8k"), seed=0)
    with pytest.raises(InputError, match="; a data set of the hub is downloaded first"):
        load_records(DataSection(source="openai/gsm8k"), seed=0)


def test_options_are_for_tasks():
    with pytest.raises(InputError, match="data.options are for reasoning_gym tasks; .* takes none"):
        load_records(DataSection(options={"size": 3}), seed=0)


def test_held_out_prompts_are_on_one_side_only(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(f'{{"prompt": "{n % 20}", "answer": "{n}"}}\n' for n in range(40)))
    config = DataSection(source=str(path), held_out=5)
    sides = {seed: [[record["prompt"] for record in load_records(config, seed, held_out=held_out)]
                    for held_out in (False, True)] for seed in (1, 2)}
    for trained, held_out in sides.values():
        assert len(set(held_out)) == len(held_out) == 5 and len(trained) == 30
        assert {*trained, *held_out} == {str(n) for n in range(20)} and not {*trained} & {*held_out}
    assert sides[1] != sides[2]
    assert load_records(config, 1, held_out=True).where(0) == f"{path}:{int(sides[1][1][0]) + 1}"
    with pytest.raises(InputError, match="data.held_out=20 leaves nothing to train on: .* has 20 "
                       "different prompts"):
        load_records(DataSection(source=str(path), held_out=20), seed=0)


def test_the_shipped_arithmetic_is_right_and_what_its_script_makes():
    records = load_records(DataSection(), seed=0)
    made = subprocess.run([sys.executable, ARITHMETIC.with_name("make_arithmetic.py")],
                          capture_output=True, check=True)
    assert made.stdout == ARITHMETIC.read_bytes()
    for record in records:
        left, sign, right = re.search(r"(\d) ([+-]) (\d)", record["prompt"]).groups()
        assert int(record["answer"]) == int(left) + (1 if sign == "+" else -1) * int(right)
    assert len({record["prompt"] for record in records}) == len(records) == 279


@pytest.mark.parametrize("written", ["1e-7", "2e16", "0.10", "-0.0", "1000000000000000000000",
                                     "0.1000000000000000001"])
def test_numbers_as_answers_are_kept_as_they_are_written(written):
    line = f'{{"prompt": "p", "answer": {written}, "half": 0.5}}'
    record = parse_line(line, "x", ("prompt", "answer"))
    assert record == {"prompt": "p", "answer": written, "half": 0.5}


def test_an_answer_that_the_reward_cannot_read_is_named(tmp_path):
    path = tmp_path / "golds.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "17 + 25"}\n')
    section = DataSection(source=str(path), prompts_per_step=1)
    def check(part):
        return answer_check("math_verify", part.source)

    with pytest.raises(InputError, match="golds.jsonl:2: math_verify cannot read the answer '17 "
                       ". 25': it is to"):
        PromptData(section, character_tokenizer("ab"), seed=0, answer_check=check)
    assert answer_check("mine.py:f",
                        str(path)) is None is answer_check("math_verify", "reasoning_gym:chain_sum")
