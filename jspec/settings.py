"""Typed settings: fields with meanings and bounds, read from YAML and dotted overrides into frozen
dataclasses.

What there is to set is declared in `jspec.config`: here is how a declaration is read, checked,
compared, written and described (OmegaConf's structured configs take "3" for 3 and "yes" for true).
Anything wrong is an `InputError` that names the key and where it came from.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from jspec import yaml_text
from jspec.choices import OTHERS_NAMES
from jspec.config_files import BASE, layers
from jspec.errors import InputError, shortened
from jspec.setting_values import checked, choices_of, shown, type_name

Override = str | tuple[str, Any]
"""'section.key=value', the value in YAML; or (section.key, value), the value taken as it is."""



def setting(default: Any, help: str, *, low: float | None = None, above: float | None = None,
            high: float | None = None, below: float | None = None, choices: tuple[str, ...] = (),
            filled: bool = False, path: bool = False, file: bool = False, often: bool = False,
            short: str = "") -> Any:
    """A dataclass field with its meaning and bounds: low <= value <= high, above < value < below,
    one of choices. Those of a list are each entry's; `filled`: it has one at least. `path`: a text
    that may name a file, where `~` is the home; `file`: or `path/to/file.py:NAME` in the place of
    one of choices. `often`: most runs set it, so the first page of help has it. `short`: a text in
    a mapping stands for a mapping that has it under this key."""
    bounds = {"help": help, "low": low, "above": above, "high": high, "below": below,
              "choices": choices, "filled": filled, "path": path, "file": file, "often": often,
              "short": short}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=bounds)
    return dataclasses.field(default=default, metadata=bounds)


def read(kind: type, path: str | Path | None, overrides: Sequence[Override]) -> Any:
    """A `kind` of its defaults, then a YAML file's values (None: no file) over those of its bases
    (`jspec.config_files`), then overrides, later ones winning.

    `${section.key}` in a text stands for that key's value; a backslash before it makes it text.

    Raises InputError for a missing or malformed file, an unknown key (with the nearest known one),
    a wrong type and a value out of range, each with the key and where it was set.
    """
    above = [_parse_override(override) for override in overrides]
    bases = [(source, layer.pop(BASE)) for source, layer in above if BASE in layer]
    origin: dict[str, str] = {}
    values, shorts = _plain(dataclasses.asdict(kind())), _shorts(kind)
    for source, layer in [*layers(path, bases[-1] if bases else None), *above]:
        _check_keys(kind, layer, (), source, origin)
        values = _merged(values, layer, shorts)
    return _build(kind, _resolved(values, origin), (), origin)


def _merged(below: dict[str, Any], above: Mapping[str, Any], shorts: Mapping[str, str],
            here: str = "") -> dict[str, Any]:
    """`above` over `below`, both of the dotted key `here`: mappings key by key, anything else as a
    whole. shorts: as `_shorts` says."""
    def merged(key: str) -> Any:
        low, high, dotted = below.get(key), above[key], f"{here}.{key}" if here else key
        if isinstance(low, str) and isinstance(high, dict) and here in shorts:
            low = {shorts[here]: low}
        both = isinstance(low, dict) and isinstance(high, dict)
        return _merged(low, high, shorts, dotted) if both else high

    return below | {key: merged(key) for key in above}


def _shorts(kind: type) -> dict[str, str]:
    """Of the dotted keys of mappings that have short entries, what a text there stands for."""
    return {".".join((*prefix, field.name)): field.metadata["short"]
            for prefix, section in _sections(kind) for field in dataclasses.fields(section)
            if field.metadata.get("short")}


_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*(\.\w+)*\}")
_MARK = re.compile(r"(\\*)(\$\{)")


def _resolved(values: dict[str, Any], origin: Mapping[str, str]) -> dict[str, Any]:
    """`values` with each reference replaced. Raises InputError for one to something else than a
    key."""
    for key, text in _texts(values):
        for mark in _MARK.finditer(text):
            if len(mark[1]) % 2 == 0 and not _REFERENCE.match(text, mark.start(2)):
                raise InputError(f"{_origin(key, origin)}: '{key}': what stands in ${{...}} must "
                                 "be a key of the "
                                 "configuration; write \\${ for the characters themselves")
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
        return resolved
    except Exception as error:  # among them RecursionError, for a reference that leads to itself
        key = getattr(error, "full_key", None) or "?"
        raise InputError(f"{_origin(key, origin)}: '{key}': "
                         f"{yaml_text.first_line(error)}") from None


def _texts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text within a container."""
    if isinstance(value, str):
        yield ".".join(path), value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, (*path, str(key)))


def _origin(key: str, origin: Mapping[str, str]) -> str:
    """Where `key`, or the setting that it is a part of, was set."""
    return next((origin[known] for known in origin if f"{key}.".startswith(f"{known}.")),
                "the configuration")


def _escaped(value: Any) -> Any:
    """A value whose texts have no reference in them: what `${` they hold is meant as it stands."""
    if isinstance(value, str):
        return _MARK.sub(lambda mark: f"{mark[1] * 2}\\${{", value)
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    # OmegaConf writes what OmegaConf reads: to PyYAML, 1e-6 is a text
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dataclasses.asdict(config))))


def refuse_changes(directory: str | Path, before: Any, after: Any, free: tuple[str, ...],
                   remedy: str = "give that value to go on with it, or choose another "
                   "output_dir") -> dict[str, tuple[Any, Any]]:
    """What of `free`, keys and sections, differs between two configurations: (before, after) by
    key. Raises InputError, naming the key, for a difference in anything else."""
    old, changed = dict(_flat(before)), {}
    for key, value in _flat(after):
        if value == old[key]:
            continue
        if not any(f"{key}.".startswith(f"{name}.") for name in free):
            inside, *both = _difference(key, old[key], value)
            was, now = (x if isinstance(x, str) else shown(x) for x in both)
            raise InputError(f"{directory} holds a run with {inside}={was}, not {now}; {remedy}")
        changed[key] = old[key], value
    return changed


def _difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """(dotted key, before, after) of the first difference between two values, looked for inside of
    mappings that have the same keys."""
    if not (isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys()):
        return key, old, new
    name = next(name for name in old if old[name] != new[name])
    return _difference(f"{key}.{name}", old[name], new[name])


def flat(config: Any) -> dict[str, Any]:
    """The value of every dotted key; mappings are whole."""
    return dict(_flat(config))


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field; mappings are whole, for their keys are not the
    configuration's."""
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
    """Rows (dotted key, type, default, meaning) of every field, in order; a section's row has only
    key and meaning."""
    rows = []
    for prefix, section in _sections(kind):
        if prefix:
            rows.append((prefix[0], "", "", " ".join((section.__doc__ or "").split())))
        field: Any
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.type):
                continue
            default = (field.default_factory() if field.default is dataclasses.MISSING
                       else field.default)
            meaning = field.metadata["help"]
            choices = " | ".join(choices_of(field))
            kind = f"a list of {choices}" if choices and isinstance(default, tuple) else choices
            rows.append((".".join((*prefix, field.name)), kind or type_name(field.type),
                         shown(default), meaning))
    return rows


def often(kind: type) -> list[str]:
    """The dotted keys that most runs set, in order."""
    return [".".join((*prefix, field.name)) for prefix, section in _sections(kind)
            for field in dataclasses.fields(section) if field.metadata.get("often")]


def _sections(kind: type) -> Iterator[tuple[tuple[str, ...], type]]:
    yield (), kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield (field.name,), field.type


def _parse_override(override: Override) -> tuple[str, dict[str, Any]]:
    """(where it comes from, for errors; the layer that it makes)."""
    if isinstance(override, str):
        label = f"override '{shortened(override)}'"
        key, equals, text = override.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise InputError(f"{label} must be key=value, such as grpo.learning_rate=1e-6")
        value = yaml_text.value(text, label)
    else:
        key, value = override[0], _escaped(override[1])
        label = f"override '{shortened(f'{key}={override[1]}')}'"
    for name in reversed(key.split(".")):
        value = {name: value}
    return label, value


def _check_keys(section: type, values: Any, path: tuple[str, ...], source: str,
                origin: dict[str, str], kind: type | None = None) -> None:
    kind = kind or section
    known: dict[str, Any] = {field.name: field for field in dataclasses.fields(section)}
    for key, value in values.items():
        here = (*path, str(key))
        dotted = ".".join(here)
        if key not in known:
            raise InputError(f"{source}: unknown key '{dotted}'; did you mean "
                             f"'{_nearest(here, kind)}'?")
        origin[dotted] = source
        if not dataclasses.is_dataclass(known[key].type):
            continue
        if not isinstance(value, dict):
            example = f"{dotted}.{dataclasses.fields(known[key].type)[0].name}"
            raise InputError(f"{source}: '{dotted}' is a section, not a value; set its keys, such "
                             f"as '{example}'")
        _check_keys(known[key].type, value, here, source, origin, kind)


def _nearest(path: tuple[str, ...], kind: type) -> str:
    """The known dotted key most like `path`: the one that others call so, of the same section where
    that has it; else by spelling of the whole and of the name; `lr` is learning_rate."""
    known = [BASE, *(".".join((*prefix, field.name)) for prefix, section in _sections(kind)
                     for field in dataclasses.fields(section))]
    wanted = ".".join(path)
    for ours in (ours for ours, theirs in OTHERS_NAMES.items() if path[-1] in theirs):
        for key in (f"{path[0]}.{ours.split('.')[-1]}", ours):
            if key in known:
                return key

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, wanted, candidate).ratio()
        name = candidate.split(".")[-1]
        is_initials = "_" in name and path[-1] == "".join(word[0] for word in name.split("_"))
        # a section that is right says more about the name than letters do
        same = len(path) > 1 and candidate.startswith(f"{path[0]}.")
        of_name = max(is_initials, difflib.SequenceMatcher(None, path[-1], name).ratio())
        return same / 2 + whole + of_name

    return max(known, key=likeness)


def _build(section: type, values: dict[str, Any], path: tuple[str, ...],
           origin: dict[str, str]) -> Any:
    made = {}
    for field in dataclasses.fields(section):
        here = (*path, field.name)
        if dataclasses.is_dataclass(field.type):
            made[field.name] = _build(cast(type, field.type), values[field.name], here, origin)
        else:
            made[field.name] = checked(field, values[field.name], ".".join(here), origin)
    return section(**made)
