"""Which implementation of a kernel runs: the plain-JAX reference, or the Pallas kernel of a
chip."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Static and hashable.

    Attributes:
      name: "reference", "tpu" (Mosaic) or "gpu" (Mosaic GPU, Hopper).
      interpret: what `pallas_call` takes by that name: False on the chip itself, else a way to run
        without it.
      fall_back: for the caller: whether the reference may take the place of a kernel that refuses a
        shape.
    """

    name: str = "reference"
    interpret: Any = False
    fall_back: bool = False

    def load(self, package: str) -> ModuleType:
        """The module of this implementation in a kernel's package. Imported when asked for: each
        needs its compiler."""
        return importlib.import_module(f"{package}.{self.name}")


REFERENCE = Implementation()
