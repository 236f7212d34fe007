"""YAML that a user wrote, as plain Python values: bounded, and whatever is wrong with it is one
line."""

import io
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from jspec.errors import InputError

MAX_BYTES, MAX_DEPTH, MAX_NODES = 2**18, 32, 20_000
"""Of a document; nodes are counted with aliases written out, for a few lines of those stand for a
whole memory."""


def read(path: Path) -> Any:
    """The value of a YAML file. Raises InputError for a file that cannot be read or is not
    valid."""
    try:
        if not path.is_file():
            raise InputError(f"config file {path} is no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, and a config at most "
                             f"{MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: it is not UTF-8 text ({error.reason} at byte "
                         f"{error.start})") from None
    return _parsed(lambda: OmegaConf.load(io.StringIO(text)), text, f"{path} is not valid YAML: ")


def value(text: str, label: str) -> Any:
    """The value that YAML gives `text` after a key. Raises InputError, which begins with
    `label`."""
    return _parsed(lambda: OmegaConf.from_dotlist([f"value={text}"]), text, f"{label}: ")["value"]


def _parsed(load, text: str, label: str) -> Any:
    try:
        _check_size(text)
        loaded = load()
        return OmegaConf.to_container(loaded, resolve=False)
    except InputError as error:
        raise InputError(f"{label}{error}") from None
    except OSError:  # what OmegaConf says of a document that is one number
        return None
    except Exception as error:
        # the constructors of YAML's tags raise whatever their text trips over
        where = _where(error) if "\n" in text else ""
        raise InputError(f"{label}{where}{first_line(error)}") from None


def _check_size(text: str) -> None:
    """Raise InputError for a document that would not end or not fit, before anything is made of
    it."""
    if len(text) > MAX_BYTES:
        raise InputError(f"{len(text)} characters, and at most {MAX_BYTES} are read")
    open_nodes: list[list[Any]] = []  # (anchor, nodes) of each collection that we are in
    sizes: dict[str, int] = {}
    total = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_nodes):
                raise InputError(f"*{event.anchor} stands inside of itself")
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = size = 1
        if open_nodes:
            open_nodes[-1][1] += size
            total = max(total, open_nodes[-1][1])
        if len(open_nodes) > MAX_DEPTH:
            raise InputError(f"nested more than {MAX_DEPTH} deep")
        if total > MAX_NODES:
            raise InputError(f"more than {MAX_NODES} values, aliases written out")


def first_line(error: Exception) -> str:
    """What an error of YAML's or OmegaConf's says, without the copy of the text that follows."""
    if "integer string conversion" in str(error):
        return f"a whole number of more than {sys.get_int_max_str_digits()} digits"
    lines = (getattr(error, "problem", None) or str(error)).strip().splitlines()
    hint = "; write a blank after the colon" if lines == ["found unexpected ':'"] else ""
    return lines[0] + hint if lines else type(error).__name__


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
