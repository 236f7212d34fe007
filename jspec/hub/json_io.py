"""JSON that came from outside: whatever is in its place is read whole and bounded, or refused in
one line."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from jspec.errors import InputError

MAX_BYTES = 256 << 20  # the largest published tokenizer.json has a tenth of it
# published files have 10; far below what Python's own recursion takes, here and in later readers
MAX_DEPTH = 64
# what may be half of a character beyond 16 bits, without its other half
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
_KINDS: dict[type, str] = {dict: "object", list: "list"}


def read_json(path: Path, required: bool = True, kind: type = dict) -> Any:
    """The JSON object (or other `kind`) in a file; None if it is not there and not `required`.

    Raises InputError for a file that is missing, is none (a folder, a pipe), cannot be read or is
    larger than MAX_BYTES, and where `parse_json` does.
    """
    data = read_bytes(path, required)
    return None if data is None else parse_json(data, path, kind)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, whole or not at all."""
    work = path.with_name(f".{path.name}")
    work.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(work, path)


def read_bytes(path: Path, required: bool = True) -> bytes | None:
    """The content of a file of at most MAX_BYTES. Raises InputError as `read_json` does."""
    try:
        if not path.exists():
            if required:
                model = "a model directory has config.json and safetensors"
                remedy = model if path.name == "config.json" else "give a directory that has one"
                raise InputError(f"{path.parent}: no {path.name}; {remedy}")
            return None
        if not path.is_file():  # a pipe would be waited for without end
            raise InputError(f"{path}: not a file; {path.name} must be one")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path}: {size} bytes are more than the {MAX_BYTES} that are read of "
                             "such a file")
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None


def parse_json(text: str | bytes, where: str | Path, kind: type = dict) -> Any:
    """The JSON object (or other `kind`: list) that `text` is; `where` it stands begins every
    message.

    Raises InputError for text that is not UTF-8, not valid JSON (NaN and numbers beyond float64 are
    not), of another kind, nested more than MAX_DEPTH deep, or that has an integer of thousands of
    digits or half a character in it.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        _check_depth(value)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise InputError(f"{where}: not valid JSON ({_TOO_DEEP}); mend it, or make it "
                         "again") from None
    except ValueError as e:
        raise InputError(f"{where}: not valid JSON ({str(e).split(';')[0]}); mend it, or make it "
                         "again") from None
    if not isinstance(value, kind):
        raise InputError(f"{where}: not a JSON {_KINDS[kind]}, but {type(value).__name__}; mend "
                         "it, or make it again")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is beyond the largest number")
    return value


def _check_depth(value: Any) -> None:
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        inside = itertools.chain.from_iterable(x.values() if type(x) is dict else x for x in level)
        level = [x for x in inside if type(x) is dict or type(x) is list]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
