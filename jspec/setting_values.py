"""The value of a setting: of its type, within its bounds, and in words."""

import dataclasses
import math
import os
import types
import typing
from typing import Any

from jspec import user_code
from jspec.errors import InputError, shortened

WHOLE_HIGH, FLOAT_LOW, FLOAT_HIGH = 2**31 - 1, 1.2e-38, 3.4e38
"""What int32 and float32 hold: the largest whole number where a setting does not say otherwise, and
the smallest and largest other number beside 0."""


def checked(field: dataclasses.Field, value: Any, dotted: str, origin: dict[str, str]) -> Any:
    fitted = _fit(value, field.type)
    expected = type_name(field.type) if fitted is _MISFIT else _out_of_bounds(fitted, field)
    if expected:
        raise InputError(f"{origin[dotted]}: '{dotted}' must be {expected}, not "
                         f"{shortened(shown(value))}{_hint(value, field, dotted)}")
    if isinstance(fitted, dict):
        for key in fitted:
            # YAML's own rule, and nobody means the key that it makes
            if fitted[key] is None and ":" in str(key):
                raise InputError(f"{origin[dotted]}: '{dotted}' has the key {shortened(repr(key))} "
                                 "without a value; "
                                 "write a blank after the colon, as in {size: 1}")
    return (_at_home(fitted, f"{origin.get(dotted, 'the defaults')}: '{dotted}'")
            if field.metadata["path"] else fitted)


def _hint(value: Any, field: dataclasses.Field, dotted: str) -> str:
    """What is to be done about a mapping or list that does not fit, or ''."""
    def takes(other: Any) -> bool:
        return _fit(other, field.type) is not _MISFIT

    if isinstance(value, dict) and takes({}):
        odd = _odd(value, dotted)
        return f"; {odd}" if odd else ""
    if not isinstance(value, list | dict) or not takes("") or takes(type(value)()):
        return ""
    return ("; several go by name, as in {a: ..., b: ...}" if takes({}) else
            f"; text with such characters needs quotes, as in {dotted}='\"...\"'")


def _odd(value: Any, dotted: str) -> str:
    """What in this is not as `_is_plain` has it, in words, or ''."""
    if isinstance(value, dict):
        names = (f"the name {shown(key)} is no text, which it is in quotes"
                 for key in value if not isinstance(key, str))
        return next(names, "") or next(filter(None, (
            _odd(item, f"{dotted}.{key}") for key, item in value.items())), "")
    if isinstance(value, list):
        return next(filter(None, (_odd(item, dotted) for item in value)), "")
    return "" if _is_plain(value) else f"'{dotted}' is {shortened(shown(value))}"


def _at_home(value: Any, label: str) -> Any:
    """A path, or each of several, by name too, with the home in the place of its ~. Raises
    InputError, which begins with `label`, for the home of a user who is not there."""
    if isinstance(value, tuple):
        return tuple(_at_home(entry, label) for entry in value)
    if isinstance(value, dict):
        return {key: _at_home(entry, label) for key, entry in value.items()}
    if not isinstance(value, str) or ("/" not in value and value != "~"):  # ~name is a name
        return value
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise InputError(f"{label}: {shortened(value)} names the home of a user who is not there; "
                         "write ./~... for a folder of that name")
    return expanded


def _out_of_bounds(fitted: Any, field: dataclasses.Field) -> str:
    """What a value of the right type must be and is not, in words, or ''."""
    bounds, is_list = field.metadata, isinstance(fitted, tuple)
    entries, each = fitted if is_list else (fitted,), "a list with each entry " if is_list else ""
    if bounds["filled"] and not fitted:
        what = "character" if isinstance(fitted, str) else "entry"
        return f"{type_name(field.type)} with one {what} at least"
    if (bounds["choices"]
        and not all(entry is None or entry in bounds["choices"]
                    or (bounds["file"] and user_code.split(entry)) for entry in entries)):
        return f"{each}one of {', '.join(choices_of(field))}"
    for entry in (entry for entry in entries if isinstance(entry, int | float)):
        if bounds["low"] is not None and entry < bounds["low"]:
            return f"{each}at least {bounds['low']}"
        if bounds["above"] is not None and entry <= bounds["above"]:
            return f"{each}above {bounds['above']}"
        high = WHOLE_HIGH if bounds["high"] is None and isinstance(entry, int) else bounds["high"]
        if high is not None and entry > high:
            return f"{each}at most {high}"
        if bounds["below"] is not None and entry >= bounds["below"]:
            return f"{each}below {bounds['below']}"
        if isinstance(entry, float) and entry and not FLOAT_LOW <= abs(entry) <= FLOAT_HIGH:
            return (f"{each}0, or between {FLOAT_LOW} and {FLOAT_HIGH} in size, which is what "
                    "float32 holds")
    return ""


def choices_of(field: dataclasses.Field) -> tuple[str, ...]:
    """What a field may be, in words."""
    return (*field.metadata["choices"], *([user_code.EXAMPLE] if field.metadata["file"] else []))
_MISFIT = object()
_UNIONS = (types.UnionType, typing.Union)


def _fit(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or _MISFIT. Only lossless conversions: int to float, list to tuple."""
    if typing.get_origin(kind) in _UNIONS:
        fits = (_fit(value, option) for option in typing.get_args(kind))
        return next((fitted for fitted in fits if fitted is not _MISFIT), _MISFIT)
    if typing.get_origin(kind) is tuple:
        items = ([_fit(item, typing.get_args(kind)[0]) for item in value] if isinstance(value, list)
                 else [_MISFIT])
        return _MISFIT if any(item is _MISFIT for item in items) else tuple(items)
    if typing.get_origin(kind) is typing.Literal:
        return value if isinstance(value, str) and value in typing.get_args(kind) else _MISFIT
    if kind is types.NoneType:
        return None if value is None else _MISFIT
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    exact = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return value if exact and _is_plain(value) else _MISFIT


def _is_plain(value: Any) -> bool:
    """Whether this is what every reader takes: texts that UTF-8 and file names can hold, finite
    numbers, and lists and mappings of those by name."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(key) and _is_plain(item)
                   for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return ("\0" not in value
                and not any("\ud800" <= character <= "\udfff" for character in value))
    return (value is None or isinstance(value, int)
            or (isinstance(value, float) and math.isfinite(value)))


def type_name(kind: Any) -> str:
    if typing.get_origin(kind) in _UNIONS:
        return " or ".join(type_name(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(typing.get_args(kind))
    return _TYPE_NAMES[kind]
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
               dict: "a mapping of names to texts, finite numbers, lists and mappings",
               tuple[int, ...]: "a list of whole numbers",
               tuple[tuple[int, ...], ...]: "a list of lists of whole numbers",
               tuple[float, ...]: "a list of numbers", tuple[str, ...]: "a list of texts",
               types.NoneType: "null"}


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value) if isinstance(value, str) else str(value)
