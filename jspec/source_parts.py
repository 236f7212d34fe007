"""What `data.source` says: one source of prompts, or several by name, each with its weight."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from jspec.errors import InputError, shortened
from jspec.learning_sections import DataSection, EvaluationSection
from jspec.reward_parts import NAME, is_number

OWN = ("split", "prompt_column", "answer_column", "options")
"""What each of several sources may have of its own; the columns are else the section's."""
OF_ONE = ("split", "options")
"""Of these the section's are those of the one source that it has."""


@dataclasses.dataclass(frozen=True)
class SourcePart:
    """One of a run's sources of prompts.

    Attributes:
        name: what rewards are told as `source_name`, and metrics are called; "": it has none, for
          it is the only one.
        number: its place among those that are named.
        weight: its share of the prompts, beside the others' weights.
        data: the section as if this were its one source.
        key: where it was set, for errors.
    """

    name: str
    number: int
    weight: Fraction
    data: DataSection
    key: str = "data.source"

    @property
    def source(self) -> str:
        """The file, folder or task."""
        return cast(str, self.data.source)

    @property
    def label(self) -> str:
        """What an error about it begins with."""
        return f"{self.key}={self.source}"


def source_parts(data: DataSection, key: str = "data.source",
                 weighted: bool = True) -> tuple[SourcePart, ...]:
    """The sources that a section names: a text is one; a mapping has each under a name of its own,
    as a text or as {source, weight, split, prompt_column, answer_column, options}. Those of weight
    0 are left out.

    Args:
        key: where the source was set.
        weighted: whether sources have weights.

    Raises InputError for what is none of these, and for weights that are all 0.
    """
    if isinstance(data.source, str):
        return (SourcePart("", 0, Fraction(1), data, key),)
    for own in OF_ONE:
        if getattr(data, own):
            raise InputError(f"data.{own} is of one source, and {key} has several by name; set it "
                             f"of each one that needs it, as {key}.NAME.{own}")
    if not data.source:
        raise InputError(f"{key} is a mapping of nothing: name one source at least")
    parts = [_part(data, key, number, name, said, weighted)
             for number, (name, said) in enumerate(data.source.items())]
    if not any(part.weight for part in parts):
        raise InputError(f"{key}: the weights are all 0, and no prompt would ever be drawn; give "
                         "one of them another weight")
    return tuple(part for part in parts if part.weight)


def _part(data: DataSection, key: str, number: int, name: str, value: Any,
          weighted: bool) -> SourcePart:
    if not NAME.fullmatch(name):
        raise InputError(f"{key} has the name {shortened(repr(name))}; it names metrics, so it "
                         "takes letters, digits and _ . - only")
    key = f"{key}.{name}"
    said: Any = {"source": value} if isinstance(value, str) else value
    keys = ("source", *(("weight",) if weighted else ()), *OWN)
    if isinstance(said, Mapping) and (unknown := said.keys() - set(keys)):
        raise InputError(f"{key} has no {min(unknown)!r}; its keys are {', '.join(keys)}")
    if not isinstance(said, Mapping) or not isinstance(said.get("source"), str):
        raise InputError(f"{key} must be a source of prompts, or a mapping such as {{source: "
                         f"my.jsonl{', weight: 0.5' * weighted}}}, not {shortened(repr(value))}")
    weight = said.get("weight", 1)
    if not is_number(weight) or weight < 0:
        raise InputError(f"{key}.weight must be a number, at least 0, that float32 holds, not "
                         f"{shortened(repr(weight))}")
    own = {name: said[name] for name in OWN if name in said}
    _check_own(key, own)
    # as it is written: 0.1 is a tenth
    return SourcePart(name, number, Fraction(str(weight)),
                      dataclasses.replace(data, source=said["source"], **own), key)


def _check_own(key: str, own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        fits = (isinstance(value, Mapping) if name == "options"
                else (isinstance(value, str) and value != "")
                or (value is None and name != "prompt_column"))
        if not fits:
            kind = "a mapping" if name == "options" else "text"
            raise InputError(f"{key}.{name} must be {kind}, not {shortened(repr(value))}")


def evaluated(data: DataSection, section: EvaluationSection) -> dict[str, DataSection]:
    """What an evaluation asks, by what it is called in the scores ("": it is the only one): of each
    source a section with a prompt a step. Those that evaluation.sources names are read as training
    reads them, where it does; sources have names for rewards where either of the two gives any.

    Raises InputError as `source_parts` does.
    """
    given, several = section.sources, not isinstance(data.source, str)
    of = {part.name: part.data for part in source_parts(data)}
    if given:
        known = {part.source: part for part in of.values()}
        bare = dataclasses.replace(data, split=None, options={})
        if isinstance(given, Mapping):
            of = {part.name: part.data for part in source_parts(dataclasses.replace(
                bare, source=given), "evaluation.sources", weighted=False)}
            several = True
        else:
            of = {label: dataclasses.replace(bare, source=source)
                  for label, source in zip(section.labels, given, strict=True)}
        texts = {name for name in of
                 if not isinstance(given, Mapping) or isinstance(given[name], str)}
        of = {name: _of_split(known.get(one.source, one), section.split) if name in texts else one
              for name, one in of.items()}
    held_out = 0 if given else data.held_out
    return {name if len(of) > 1 else "": _alone(name, one, several, held_out)
            for name, one in of.items()}


def _of_split(data: DataSection, split: str | None) -> DataSection:
    return (dataclasses.replace(data, split=split)
            if split and Path(cast(str, data.source)).is_dir() else data)


def _alone(name: str, data: DataSection, has_name: bool, held_out: int) -> DataSection:
    """A section of one source, which has a name or has none."""
    data = dataclasses.replace(data, prompts_per_step=1, over_sampling=1.0, held_out=held_out,
                               curriculum=False)
    if not has_name:
        return data
    own = {key: getattr(data, key) for key in OWN}
    return dataclasses.replace(data, source={name: {"source": data.source, **own}}, split=None,
                               options={})


def in_short(source: str | Mapping[str, Any]) -> str:
    """`data.source` in a few words."""
    return source if isinstance(source, str) else ", ".join(source)
