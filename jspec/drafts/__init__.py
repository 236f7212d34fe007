"""Drafters. Every file here but `base` is one: its `init` is this package's function of the same name, and its
`remember`, where it has one, is an attribute of that. `parts` is what several of them are made of."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType

from jspec.arguments import nearest, random_key
from jspec.drafts.base import Draft
from jspec.errors import InputError
from jspec.model import check_policy

NAMES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base" and not m.ispkg))


def _public(name: str, module: ModuleType) -> Callable[..., Draft]:
    """The module's `init` with what is the same for all drafters: the policy and the names of options are checked, a
    key may be a seed, and where the weights are drawn at random there must be one."""
    init = module.init
    _, key_parameter, *options = inspect.signature(init).parameters.values()
    known = [option.name for option in options]

    @functools.wraps(init)
    def make(policy, key=None, **given):
        check_policy(f"the policy of jspec.drafts.{name}", policy)
        if key is None and key_parameter.default is inspect.Parameter.empty:
            raise InputError(f"{name} draft: its weights are drawn at random; give a seed or a key, such as "
                             f"jspec.drafts.{name}(policy, 0)")
        for option in given:
            if option not in known:
                raise InputError(f"{name} draft: it has no option {option!r}{nearest(option, known)}; options: "
                                 f"{', '.join(known) or 'none'}")
        return init(policy, None if key is None else random_key(f"{name} draft: key", key), **given)

    make.__name__ = make.__qualname__ = name  # which is what Python says of a call that it refuses
    if hasattr(module, "remember"):
        make.remember = module.remember
    return make


# after the submodules are imported, so that jspec.drafts.mtp is the function and not the module
globals().update({name: _public(name, importlib.import_module(f"{__name__}.{name}")) for name in NAMES})

__all__ = ["Draft", "NAMES", *NAMES]
