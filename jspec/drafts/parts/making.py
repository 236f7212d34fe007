"""How drafts are made: a drafter's `init`, checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jspec.arguments import nearest, random_key, show
from jspec.choices import DRAFTERS
from jspec.drafts.base import Draft, Drafter
from jspec.errors import InputError
from jspec.model import Policy, check_policy


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
