"""The one reader of JSON from outside: what is right is read, all else is one line."""

import os

import pytest

from jspec.errors import InputError
from jspec.hub import json_io
from jspec.hub.json_io import parse_json, read_json


def test_what_is_right_is_read(tmp_path):
    text = ('{"a": [1, 2.5, null, true, {"b": "\\ud83d\\ude42 \\u00e9"}], "n": '
            '1000000000000000019884624838656}')
    want = {"a": [1, 2.5, None, True, {"b": "🙂 é"}], "n": 1000000000000000019884624838656}
    assert parse_json(text, "x") == parse_json(text.encode(), "x") == want
    (tmp_path / "x").write_text(text)
    assert read_json(tmp_path / "x") == want
    assert read_json(tmp_path / "none", required=False) is None
    assert parse_json("[1]", "x", list) == [1]
    deep = "[" * (json_io.MAX_DEPTH - 1)
    assert parse_json('{"a":' + deep + deep.replace("[", "]") + "}", "x")


@pytest.mark.parametrize("text, message", [
    ("{", "not valid JSON"),
    ("", "not valid JSON"),
    (b'{"a": "\xff"}', "not valid JSON .*utf-8"),
    ('{"a": NaN}', "NaN is no number of JSON"),
    ('{"a": -Infinity}', "-Infinity is no number of JSON"),
    ('{"a": 1e999}', "1e999 is beyond the largest number"),
    ('{"a": ' + "7" * 5000 + "}", "5000 digits"),
    ('{"a": "\\ud800"}', "not valid JSON .*surrogates"),
    ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested more than 64 deep"),
    ('{"a": ' + "[" * 200_000, "nested more than 64 deep"),
    ("[1]", "not a JSON object, but list"),
    ("null", "not a JSON object, but NoneType"),
])
def test_what_is_wrong_is_one_line(text, message):
    with pytest.raises(InputError, match=f"file.json:3: .*{message}") as e:
        parse_json(text, "file.json:3")
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text('{"a": 1}')
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr(json_io, "MAX_BYTES", 7)
    for name, message in (
        ("folder", "not a file"), ("pipe", "not a file"), ("large", "8 bytes are more than the 7"),
        ("missing", "no missing; give a directory that has one"),
        ("loop", "no loop|cannot be read"),
        ("x" * 300, "cannot be read .*too long"), ("large/x", "no x|cannot be read")):
        with pytest.raises(InputError, match=message):
            read_json(tmp_path / name)
