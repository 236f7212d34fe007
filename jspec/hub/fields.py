"""Values of a config that came from outside (config.json, a GGUF's metadata): each of its type, or
one line says which.

A key that is there and null counts as not there, as in transformers. `where` begins every message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jspec.arguments import INT32
from jspec.errors import InputError

CONFIG = "config.json"


def whole(fields: Mapping[str, Any], key: str, default: int | None = None, where: str = CONFIG,
          least: int = 1) -> int:
    """A whole number of at least `least`. Raises InputError where it is none, or is not there and
    has no default."""
    value = _given(fields, key, default)
    if not _is_number(value) or value != int(value) or not least <= value <= INT32:
        kinds = {0: "a whole number", 1: "a positive integer"}
        raise _wrong(value, key, where, kinds.get(least, f"an integer of at least {least}"))
    return int(value)


def number(fields: Mapping[str, Any], key: str, default: float | None = None,
           where: str = CONFIG) -> float:
    """A finite number. Raises InputError as `whole` does."""
    value = _given(fields, key, default)
    if not _is_number(value):
        raise _wrong(value, key, where, "a number")
    return float(value)


def flag(fields: Mapping[str, Any], key: str, default: bool = False, where: str = CONFIG) -> bool:
    """True or false; a text like "false", which counts as true in Python, is neither."""
    value = _given(fields, key, default)
    if not isinstance(value, bool):
        raise _wrong(value, key, where, "true or false")
    return value


def section(fields: Mapping[str, Any], key: str, where: str = CONFIG) -> dict[str, Any]:
    """An object of keys of its own; empty if it is not there."""
    value = _given(fields, key, {})
    if not isinstance(value, dict):
        raise _wrong(value, key, where, "an object")
    return value


def texts(fields: Mapping[str, Any], key: str, where: str = CONFIG) -> list[str]:
    """A list of texts; empty if it is not there."""
    value = _given(fields, key, [])
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
        raise _wrong(value, key, where, "a list of texts")
    return list(value)


def wholes(fields: Mapping[str, Any], key: str, where: str = CONFIG) -> list[int]:
    """A list of whole numbers; empty if it is not there."""
    value = _given(fields, key, [])
    if not isinstance(value, list) or not all(type(x) is int and x >= 0 for x in value):
        raise _wrong(value, key, where, "a list of whole numbers")
    return list(value)


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Errors inside begin with the directory that is read."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def agreed(fields: Mapping[str, Any], *names: str, where: str = CONFIG) -> str:
    """Of several names of one value the first that is there, or the first of all. Raises
    InputError where two of them are there with different values."""
    there = [name for name in names if fields.get(name) is not None]
    for other in there[1:]:
        if fields[other] != fields[there[0]]:
            raise contradiction(there[0], fields[there[0]], other, fields[other], where)
    return (there or names)[0]


def merged(fields: Mapping[str, Any], key: str, names: Iterable[str],
           where: str = CONFIG) -> dict[str, Any]:
    """What is said under these names, at the top or in the object `key`. Raises InputError where
    the two say different things of one."""
    inside, out = section(fields, key, where), {}
    for name in names:
        both = {name: fields.get(name), f"{key}.{name}": inside.get(name)}
        value = both[agreed(both, *both, where=where)]
        if value is not None:
            out[name] = value
    return out


def contradiction(first: str, one: Any, second: str, other: Any,
                  where: str = CONFIG) -> InputError:
    """The error for two keys whose values cannot both be true."""
    return InputError(f"{where} has {short(one)} as {first}, and {short(other)} as {second}, which "
                      "contradict each other; keep what is true")


def _given(fields: Mapping[str, Any], key: str, default: Any) -> Any:
    value = fields.get(key)
    return default if value is None else value


def _is_number(value: Any) -> bool:
    """Whether it is one and float64 holds it."""
    try:
        return (isinstance(value, int | float) and not isinstance(value, bool)
                and math.isfinite(value))
    except OverflowError:
        return False


def _wrong(value: Any, key: str, where: str, expected: str) -> InputError:
    problem = "has no" if value is None else f"has {short(value)} as"
    return InputError(f"{where} {problem} {key}; expected {expected}")


def short(value: Any) -> str:
    """A value for a message: as Python writes it, at most 60 characters."""
    try:
        said = repr(value)
    except ValueError:  # an integer of thousands of digits
        said = "a number beyond all bounds"
    return said if len(said) <= 60 else said[:57] + "..."
