"""Drafters. Every file here but `base` is one: its `init` is this package's function of the same name. `parts` is what
several of them are made of."""

import importlib
import pkgutil

from jspec.drafts.base import Draft

NAMES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base" and not m.ispkg))

# after the submodules are imported, so that jspec.drafts.mtp is the function and not the module
globals().update({name: importlib.import_module(f"{__name__}.{name}").init for name in NAMES})

__all__ = ["Draft", "NAMES", *NAMES]
