"""Config files as layers: a file over the one that it names as its `base`, and so on down."""

import difflib
import os
from pathlib import Path
from typing import Any

from jspec import yaml_text
from jspec.errors import InputError, shortened
from jspec.setting_values import shown

BASE = "base"
"""The key of a file that names the one whose values hold where it says nothing."""

PRESETS = Path(__file__).parent / "presets"
"""The files that ship as bases; each is a few keys and says where they come from."""

Layer = tuple[str, dict[str, Any]]
"""(where it comes from, for errors; its values)."""


def presets() -> tuple[str, ...]:
    """The names of the presets that ship."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def layers(path: str | Path | None, base: tuple[str, Any] | None = None) -> list[Layer]:
    """A config file over its bases, the lowest first.

    Args:
      path: None: no file.
      base: (where it is named, what is named) in the place of the file's own; its path is relative
        to where jspec was started.

    Raises InputError, which names file and key, for a file that is missing or malformed, and for
    bases that lead back to where they came from.
    """
    found: list[Layer] = []
    seen: set[str] = set()
    path = None if path is None else Path(os.path.expanduser(path))
    named = None if base is None else (*base, Path())
    while path is not None or named is not None:
        if path is not None:
            values = _read(path)
            seen.add(os.path.realpath(path))
            found.insert(0, (str(path), {key: values[key] for key in values if key != BASE}))
            if named is None and BASE in values:
                named = (str(path), values[BASE], path.parent)
        path = None if named is None else _find(*named, seen)
        named = None
    return found


def _find(label: str, name: Any, folder: Path, seen: set[str]) -> Path:
    """The file that a base names: one relative to `folder`, or else a preset."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(f"{label}: '{BASE}' must name a config file or a preset "
                         f"({', '.join(presets())}), not {shortened(shown(name))}")
    path = folder / os.path.expanduser(name)
    preset = name.removesuffix(".yaml")
    if not os.path.exists(path) and preset in presets():
        path = PRESETS / f"{preset}.yaml"
    if os.path.realpath(path) in seen:
        raise InputError(f"{label}: '{BASE}' leads in a circle, back to {shortened(str(path))}; "
                         "let one of these files name no base")
    if os.path.exists(path):
        return path
    near = difflib.get_close_matches(name, [*presets(), *_neighbours(path)], 1)
    hint = f"; did you mean {near[0]}?" if near else f" ({', '.join(presets())})"
    raise InputError(f"{label}: '{BASE}': {shortened(str(path))} does not exist, and no preset has "
                     f"that name{hint}")


def _neighbours(path: Path) -> list[str]:
    return [file.name for file in path.parent.glob("*.yaml")]


def _read(path: Path) -> dict[str, Any]:
    if not os.path.exists(path):  # unlike Path's, quiet about names that no file can have
        near = difflib.get_close_matches(path.name, _neighbours(path), 1, 0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"config file {shortened(str(path))} does not exist{hint}")
    loaded = yaml_text.read(path)
    if not isinstance(loaded, dict):
        raise InputError(f"{path} must hold key: value pairs, such as 'steps: 10'")
    return loaded
