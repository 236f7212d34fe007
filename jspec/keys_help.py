"""The keys of a config as help: one page of all sections, and each section with default and
meaning."""

import difflib
import importlib
import textwrap
from typing import Any

from jspec import settings
from jspec.config_files import presets
from jspec.errors import InputError, shortened

WIDTH = 100


def keys_help(target: str, command: str, topic: str | None) -> str:
    """What `command --help topic` says of the keys of `target`, such as "config:Config"; topic: a
    section, a key or "all"; None: a page of what there is.

    Raises InputError for a topic that is none.
    """
    module, _, name = target.partition(":")
    kind = getattr(importlib.import_module(f"jspec.{module}"), name)
    return _page(kind, command) if topic is None else _in_full(kind, topic)


def _page(kind: type, command: str) -> str:
    rows = settings.describe(kind)
    keys = {key: (default, meaning) for key, kind_name, default, meaning in rows if kind_name}
    sections = {key: meaning for key, kind_name, _, meaning in rows if not kind_name}
    lines = ["keys of a config, each also settable as key=value after it; what most set:", ""]
    for key in settings.often(kind):
        default, meaning = keys[key]
        lines += _entry(f"{key} = {default}", meaning, 44, max_lines=2, placeholder=" ...")
    lines += ["", f"all, by section (`{command} --help SECTION`, or `all`: what they mean):", ""]
    ships = f": {' '.join(presets())}" if "grpo" in sections else ""  # all of them set that one
    lines += _entry("", " ".join(key for key in keys if "." not in key), 16)
    lines += _entry("base", f"a file or a preset for what the config leaves out{ships}", 16)
    for section, meaning in sections.items():
        names = [key.partition(".")[2] for key in keys if key.startswith(f"{section}.")]
        lines += _entry(section, f"{meaning.rstrip('.')}:", 16) + _entry("", " ".join(names), 16)
    return "\n".join(lines) + "\n"


def _entry(name: str, said: str, indent: int, **options: Any) -> list[str]:
    """A name and what is said of it, in two columns; a long name has a line of its own."""
    lines = textwrap.wrap(said, WIDTH - indent, break_on_hyphens=False, **options)
    names = [name, *[""] * (len(lines) - 1)]
    if len(name) > indent - 4:
        names, lines = [*names, ""], ["", *lines]
    return [f"  {left:<{indent - 2}}{line}".rstrip()
            for left, line in zip(names, lines, strict=True)]


def _in_full(kind: type, topic: str) -> str:
    rows = [row for row in settings.describe(kind)
            if topic == "all" or f"{row[0]}.".startswith(f"{topic}.")]
    if not rows:
        known = ["all", *(key for key, *_ in settings.describe(kind))]
        near = difflib.get_close_matches(topic, known, 1)
        hint = f"; did you mean '{near[0]}'?" if near else "; `--help` lists them"
        raise InputError(f"--help: there is no section and no key '{shortened(topic)}'{hint}")
    lines = []
    for key, kind_name, default, meaning in rows:
        if not kind_name:
            lines.append(f"\n  {key}: {meaning}")
            continue
        lines.append(f"    {key + ' = ' + default:<44} {kind_name}")
        lines += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"
