"""Typed settings: fields with meanings and bounds, read from YAML and dotted overrides into frozen dataclasses.

What there is to set is declared elsewhere (`jspec.config`): here is how a declaration is read, checked, compared,
written and described. Anything wrong is an `InputError` that names the key and where it came from.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jspec.errors import InputError


def setting(default: Any, help: str, *, low: float | None = None, above: float | None = None,
            high: float | None = None, choices: tuple[str, ...] = (), filled: bool = False) -> Any:
    """A dataclass field with its meaning and bounds: low <= value <= high, value > above, one of choices. Those of a
    list are each entry's; `filled`: it has one at least."""
    bounds = {"help": help, "low": low, "above": above, "high": high, "choices": choices, "filled": filled}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=bounds)
    return dataclasses.field(default=default, metadata=bounds)


def read(kind: type, path: str | Path | None, overrides: Sequence[str]) -> Any:
    """A `kind` of its defaults, then a YAML file's values (None: no file), then `section.key=value` overrides, later
    ones winning.

    Raises InputError for a missing or malformed file, an unknown key (with the nearest known one), a wrong type and a
    value out of range, each with the key and where it was set.
    """
    layers = [] if path is None else [(str(path), _read_file(Path(path)))]
    layers += [(f"override '{text}'", _parse_override(text)) for text in overrides]
    origin: dict[str, str] = {}
    for source, layer in layers:
        _check_keys(kind, OmegaConf.to_container(layer, resolve=False), (), source, origin)
    try:
        merged = OmegaConf.merge(_plain(dataclasses.asdict(kind())), *(layer for _, layer in layers))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise InputError(f"{origin.get(key, path)}: '{key}': {_first_line(error)}") from None
    return _build(kind, values, (), origin)


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def refuse_changes(directory: str | Path, before: Any, after: Any, free: tuple[str, ...],
                   remedy: str = "give that value to go on with it, or choose another output_dir") -> None:
    """Raise InputError, naming the key, if two configurations differ in more than the keys and sections in `free`."""
    old = dict(_flat(before))
    for key, value in _flat(after):
        if value != old[key] and not any(f"{key}.".startswith(f"{name}.") for name in free):
            was, now = (x if isinstance(x, str) else _show(x) for x in (old[key], value))
            raise InputError(f"{directory} holds a run with {key}={was}, not {now}; {remedy}")


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field; mappings are whole, for their keys are not the configuration's."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{field.name}.")
        else:
            yield prefix + field.name, value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def describe(kind: type) -> list[tuple[str, str, str, str]]:
    """Rows (dotted key, type, default, meaning) of every field, in order; a section's row has only key and meaning."""
    rows = []
    for prefix, section in _sections(kind):
        if prefix:
            rows.append((prefix[0], "", "", (section.__doc__ or "").strip()))
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.type):
                continue
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            meaning = field.metadata["help"]
            choices = " | ".join(field.metadata["choices"])
            kind = f"a list of {choices}" if choices and isinstance(default, tuple) else choices
            rows.append((".".join((*prefix, field.name)), kind or _type_name(field.type), _show(default), meaning))
    return rows


def _sections(kind: type) -> Iterator[tuple[tuple[str, ...], type]]:
    yield (), kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield (field.name,), field.type


def _read_file(path: Path):
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"config file {path} does not exist{hint}")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {_where(error)}{_first_line(error)}") from None
    except OSError:  # also what OmegaConf says of a document that is one number
        loaded = None
    if not OmegaConf.is_dict(loaded):
        raise InputError(f"{path} must hold key: value pairs, such as 'steps: 10'")
    return loaded


def _parse_override(text: str):
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override '{text}' must be key=value, such as grpo.learning_rate=1e-6")
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"override '{text}': {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).strip().splitlines()[0]


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _check_keys(section: type, values: Any, path: tuple[str, ...], source: str, origin: dict[str, str],
                kind: type | None = None) -> None:
    kind = kind or section
    known = {field.name: field for field in dataclasses.fields(section)}
    for key, value in values.items():
        here = (*path, str(key))
        dotted = ".".join(here)
        if key not in known:
            raise InputError(f"{source}: unknown key '{dotted}'; did you mean '{_nearest(here, kind)}'?")
        origin[dotted] = source
        if not dataclasses.is_dataclass(known[key].type):
            continue
        if not isinstance(value, dict):
            example = f"{dotted}.{dataclasses.fields(known[key].type)[0].name}"
            raise InputError(f"{source}: '{dotted}' is a section, not a value; set its keys, such as '{example}'")
        _check_keys(known[key].type, value, here, source, origin, kind)


def _nearest(path: tuple[str, ...], kind: type) -> str:
    """The known dotted key most like `path`, by spelling of the whole and of the name; `lr` is learning_rate."""
    known = [".".join((*prefix, field.name)) for prefix, section in _sections(kind)
             for field in dataclasses.fields(section)]
    wanted = ".".join(path)

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, wanted, candidate).ratio()
        name = candidate.split(".")[-1]
        is_initials = "_" in name and path[-1] == "".join(word[0] for word in name.split("_"))
        return whole + max(is_initials, difflib.SequenceMatcher(None, path[-1], name).ratio())

    return max(known, key=likeness)


def _build(section: type, values: dict[str, Any], path: tuple[str, ...], origin: dict[str, str]):
    made = {}
    for field in dataclasses.fields(section):
        here = (*path, field.name)
        if dataclasses.is_dataclass(field.type):
            made[field.name] = _build(field.type, values[field.name], here, origin)
        else:
            made[field.name] = _checked(field, values[field.name], ".".join(here), origin)
    return section(**made)


def _checked(field: dataclasses.Field, value: Any, dotted: str, origin: dict[str, str]) -> Any:
    def wrong(expected: str) -> InputError:
        return InputError(f"{origin[dotted]}: '{dotted}' must be {expected}, not {_show(value)}")

    fitted = _fit(value, field.type)
    if fitted is _MISFIT:
        raise wrong(_type_name(field.type))
    bounds, is_list = field.metadata, isinstance(fitted, tuple)
    entries, each = fitted if is_list else (fitted,), "a list with each entry " if is_list else ""
    if bounds["filled"] and not fitted:
        raise wrong(f"{_type_name(field.type)} with one entry at least")
    if bounds["choices"] and not set(entries) <= set(bounds["choices"]):
        raise wrong(f"{each}one of {', '.join(bounds['choices'])}")
    if bounds["low"] is not None and any(entry < bounds["low"] for entry in entries):
        raise wrong(f"{each}at least {bounds['low']}")
    if bounds["above"] is not None and any(entry <= bounds["above"] for entry in entries):
        raise wrong(f"{each}above {bounds['above']}")
    if bounds["high"] is not None and any(entry > bounds["high"] for entry in entries):
        raise wrong(f"{each}at most {bounds['high']}")
    return fitted


_MISFIT = object()


def _fit(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or _MISFIT. Only lossless conversions: int to float, list to tuple."""
    if isinstance(kind, types.UnionType):
        fits = (_fit(value, option) for option in typing.get_args(kind))
        return next((fitted for fitted in fits if fitted is not _MISFIT), _MISFIT)
    if typing.get_origin(kind) is tuple:
        items = [_fit(item, typing.get_args(kind)[0]) for item in value] if isinstance(value, list) else [_MISFIT]
        return _MISFIT if any(item is _MISFIT for item in items) else tuple(items)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else _MISFIT
    if kind is types.NoneType:
        return None if value is None else _MISFIT
    exact = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return value if exact else _MISFIT


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(kind))
    return _TYPE_NAMES[kind]


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping",
               tuple[int, ...]: "a list of whole numbers",
               tuple[float, ...]: "a list of numbers", tuple[str, ...]: "a list of texts", types.NoneType: "null"}


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value) if isinstance(value, str) else str(value)
