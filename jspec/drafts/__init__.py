"""Drafters by name. Every file here but `base` and `types` has one, under the file's own name, for
which this package has a function that makes drafts. `parts` is what several of them are made of."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jspec import user_code
from jspec.arguments import nearest, random_key, show
from jspec.choices import DRAFTERS
from jspec.drafts.base import Draft, Drafter, check_drafter
from jspec.errors import InputError
from jspec.model import Policy, check_policy

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


def constructor(drafter: Drafter) -> Callable[..., Draft]:
    """The drafter's `init` with what is the same for all: the policy and the names of options are
    checked, a key may be a seed, and where weights are drawn at random there must be one. Raises
    InputError."""
    init, name = drafter.init, drafter.name
    called = f"jspec.drafts.{name}" if name in DRAFTERS else name
    _, key_parameter, *options = inspect.signature(init).parameters.values()
    names = [option.name for option in options]

    @functools.wraps(init)
    def checked(policy: Policy, key: Any = None, **given: Any) -> Draft:
        check_policy(f"the policy of {called}", policy)
        if key is None and key_parameter.default is inspect.Parameter.empty:
            raise InputError(f"{name} draft: its weights are drawn at random; give a seed or "
                             f"a key, such as {called}(policy, 0)")
        for option in given:
            if option not in names:
                raise InputError(f"{name} draft: it has no option {option!r}"
                                 f"{nearest(option, names)}; options: {', '.join(names) or 'none'}")
        key = None if key is None else random_key(f"{name} draft: key", key)
        made = init(policy, key, **given)
        if not isinstance(made, Draft) or made.drafter != drafter:
            raise InputError(f"{name} draft: its init must return a Draft of this drafter, not "
                             f"{show(made)}")
        return made

    if drafter.remember is not None:  # for a loop of one's own
        checked.__dict__["remember"] = drafter.remember
    # which is what Python says of a call that it refuses
    checked.__name__ = checked.__qualname__ = name
    return checked


# after the submodules are imported, so that jspec.drafts.mtp is the function and not the module
globals().update({name: constructor(drafter) for name, drafter in _OWN.items()})

__all__ = ["Draft", "Drafter", "DRAFTERS", "constructor", "find", "known", *DRAFTERS]
