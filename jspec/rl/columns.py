"""From a row of a source to a record: which of its columns are prompt and answer."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from jspec.errors import InputError, shortened
from jspec.rl.messages import read_prompt

KEYS = ("prompt", "answer")
"""What a record calls its prompt and answer, and the columns that have them if nothing is said."""
OF_THE_RESPONSE = {"response", "finished", "length", "max_new_tokens"}
"""What reward functions are told about a response: no record may say it."""


def record_of(row: Mapping[str, Any], where: str, columns: Sequence[str] = KEYS,
              setting: str = "", written: Callable[[], Mapping[str, Any]] | None = None
              ) -> dict[str, Any]:
    """A row as {prompt, answer, ...}.

    Args:
        row: by column. One whose name has dots is also looked for inside columns.
        where: the row stands, for errors.
        columns: of the prompt, and, if there is to be one, of the answer. Where there is no
            "prompt" but "messages", these are the prompt.
        setting: what named the source, for errors.
        written: makes the row with all numbers as they were written, for an answer that is one.

    Raises InputError for what cannot be a prompt or its answer.
    """
    if columns[0] == "prompt" and "prompt" not in row and "messages" in row:
        columns = ("messages", *columns[1:])
    found = [column(row, name, where, key, setting)
             for name, key in zip(columns, KEYS, strict=False)]
    for taken in OF_THE_RESPONSE & row.keys() - set(columns):
        raise InputError(f"{where}: the key {taken!r} is taken: reward functions are told the "
                         "response's own by it; rename it")
    record = {"prompt": read_prompt(found[0], f"{where}: {columns[0]!r}")}
    if len(found) > 1:
        if isinstance(found[1], float) and written:
            found[1] = column(written(), columns[1], where, "answer", setting)
        record["answer"] = read_answer(found[1], f"{where}: {columns[1]!r}")
    return record | {key: value for key, value in row.items() if key not in (*columns, *KEYS)}


def column(row: Mapping[str, Any], name: str, where: str, key: str, setting: str) -> Any:
    """The value of a column. Raises InputError if it is not there."""
    if name in row:
        return row[name]
    inside, _, rest = name.partition(".")
    if rest and isinstance(row.get(inside), Mapping):
        return column(row[inside], rest, f"{where}: in {inside!r}", key, setting)
    near = difflib.get_close_matches(name, map(str, row), n=1)
    named = f"{section_of(setting)}.{key}"
    hint = f"; did you mean {near[0]!r}? {named}_column names it" if near else (
        f"; {named}_column names another")
    raise InputError(f"{where}: no {name!r} (it has "
                     f"{shortened(', '.join(map(repr, row))) or 'no keys'})"
                     + (hint if setting.startswith("data.") else ""))


def section_of(setting: str) -> str:
    """Where the further settings of a source stand that `setting` has named."""
    return "data" if setting == "data.source" else setting


def read_answer(value: Any, label: str) -> str:
    """An answer as text; a number as it is written. Raises InputError for what is neither."""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{label} is not a string, but {type(value).__name__}")
    return value
