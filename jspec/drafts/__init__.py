"""Drafters by name. Every file here but `base` and `types` has one, under the file's own name, for
which this package has a function that makes drafts. `parts` is what several of them are made of."""

import importlib
from typing import Any

import jax

from jspec import user_code
from jspec.arguments import show
from jspec.choices import DRAFTERS
from jspec.drafts.base import Draft, Drafter, check_drafter
from jspec.drafts.parts.making import constructor
from jspec.errors import InputError

_OWN = {name: getattr(importlib.import_module(f"{__name__}.{name}"), name) for name in DRAFTERS}


def find(name: str, label: str | None = None) -> Drafter:
    """The drafter of a name: jspec's own, or a user's, `path/to/file.py:NAME`, whose file is run.
    (A name that comes with a checkpoint or a head is for `known`.)

    label: what the message of an error begins with. Raises InputError if there is no such drafter,
    or it is not whole.
    """
    label = f"drafter {show(name)}" if label is None else label
    if user_code.split(name) is None:
        return known(name)
    # a draft may be wanted under a trace, and the file's own arrays are to be arrays there too
    with jax.ensure_compile_time_eval():
        found = user_code.load(label, name, "drafter", lambda value: isinstance(value, Drafter))
    drafter = check_drafter(label, found)
    if drafter.name in DRAFTERS:
        raise InputError(f"{label}: its name is {drafter.name!r}, which is one of jspec's own; "
                         "give it another")
    return drafter


def known(name: Any, given: Drafter | None = None) -> Drafter:
    """The drafter of a name that comes with a draft's file: one of jspec's own, or the one that is
    `given`. No file is run, and nothing imported. Raises InputError for any other name."""
    if given is not None and given.name == name:
        return given
    if not isinstance(name, str) or name not in _OWN:
        raise InputError(f"drafter {show(name)} is unknown; known: {', '.join(DRAFTERS)}; one of "
                         f"your own is named by its file, draft.name={user_code.EXAMPLE}, or "
                         "given, drafter=jspec.drafts.find('...')")
    return _OWN[name]


# after the submodules are imported, so that jspec.drafts.mtp is the function and not the module
globals().update({name: constructor(drafter) for name, drafter in _OWN.items()})

__all__ = ["Draft", "Drafter", "DRAFTERS", "constructor", "find", "known", *DRAFTERS]
