"""What `reward.function` says: one reward function, or several by name, each with its weight."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jspec.errors import InputError, shortened
from jspec.setting_values import FLOAT_HIGH

KEYS = ("function", "weight", "options", "timeout_s", "sources")
NAME = re.compile(r"[A-Za-z0-9_.-]+")
"""What every logger takes in the name of a metric."""


@dataclasses.dataclass(frozen=True)
class RewardPart:
    """One of a run's reward functions.

    Attributes:
        name: what its metrics are called.
        function: "math_verify", "reasoning_gym", "soft_overlong", or "path/to/file.py:NAME".
        weight: what its value is multiplied by before they are added up; 0: it is only logged.
        options: further keyword arguments of every call.
        timeout_s: seconds of one call; None: `reward.timeout_s`.
        sources: the names of those that it grades answers of (`data.source`); None: of all.
        key: where it was set, for errors.
    """

    name: str
    function: str
    weight: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout_s: float | None = None
    sources: tuple[str, ...] | None = None
    key: str = "reward.function"

    @property
    def label(self) -> str:
        """What an error about it begins with."""
        return f"{self.key}={self.function!r}"

    def grades(self, source: Any) -> bool:
        """Whether it grades answers to prompts of the source of this name."""
        return self.sources is None or source in self.sources


def reward_parts(function: str | Mapping[str, Any]) -> tuple[RewardPart, ...]:
    """The reward functions that `reward.function` names: a text is one, of weight 1, called what
    stands behind its last colon; a mapping has each under a name of its own, as a text or as
    {function, weight, options, timeout_s, sources}.

    Raises InputError for what is none of these, and for weights that are all 0.
    """
    if isinstance(function, str):
        return (RewardPart(function.rpartition(":")[2], function),)
    parts = tuple(_part(name, value) for name, value in function.items())
    if not parts:
        raise InputError("reward.function is a mapping of nothing: name one function at least")
    if not any(part.weight for part in parts):
        raise InputError("reward.function: the weights are all 0, and nothing would be learned; "
                         "give one of them another weight")
    return parts


def _part(name: str, value: Any) -> RewardPart:
    key = f"reward.function.{name}"
    if not NAME.fullmatch(name):
        raise InputError(f"reward.function has the name {shortened(repr(name))}; it names metrics, "
                         "so it takes letters, digits and _ . - only")
    said: Any = {"function": value} if isinstance(value, str) else value
    if not isinstance(said, Mapping) or not isinstance(said.get("function"), str):
        raise InputError(f"{key} must be a function's name, or a mapping such as "
                         f"{{function: math_verify, weight: 0.5}}, not {shortened(repr(value))}")
    if unknown := said.keys() - set(KEYS):
        raise InputError(f"{key} has no {min(unknown)!r}; its keys are {', '.join(KEYS)}")
    weight, timeout_s = said.get("weight", 1.0), said.get("timeout_s")
    if not is_number(weight):
        raise InputError(f"{key}.weight must be a number that float32 holds, not "
                         f"{shortened(repr(weight))}")
    if timeout_s is not None and not (is_number(timeout_s) and 0 < timeout_s <= 1e6):
        raise InputError(f"{key}.timeout_s must be a number of seconds above 0 and at most 1e6, "
                         f"not {shortened(repr(timeout_s))}")
    options = said.get("options", {})
    if not isinstance(options, Mapping):
        raise InputError(f"{key}.options must be a mapping of the function's further arguments, "
                         f"not {shortened(repr(options))}")
    sources = said.get("sources")
    if sources is not None and not (isinstance(sources, list) and sources and all(
            isinstance(source, str) for source in sources)):
        raise InputError(f"{key}.sources must be a list of names that data.source gives, not "
                         f"{shortened(repr(sources))}")
    return RewardPart(name, said["function"], float(weight), dict(options), timeout_s,
                      None if sources is None else tuple(sources), key)


def grading(function: str | Mapping[str, Any], source: str) -> str | Mapping[str, Any]:
    """Those of the reward functions that grade answers to prompts of the source of this name.
    Raises InputError where none of them with a weight does."""
    parts = [part for part in reward_parts(function) if part.grades(source)]
    if not any(part.weight for part in parts):
        where = f"the source {source!r} of data.source" if source else (
            "data.source, whose prompts have no source by name")
        raise InputError(f"reward.function: no function with a weight grades {where}; name it "
                         "under the sources of one, or leave sources out of one")
    return function if isinstance(function, str) else {part.name: function[part.name]
                                                       for part in parts}


def is_number(value: Any) -> bool:
    """Whether this is a number that float32 holds."""
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and abs(value) <= FLOAT_HIGH)
