"""The records of a run's sources, one source after the other."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jspec.errors import InputError
from jspec.learning_sections import DataSection
from jspec.rl.encode import encode_prompts
from jspec.rl.records import Records, Selected, divided, read_records
from jspec.rl.reward_calls import SOURCE_NAME
from jspec.source_parts import SourcePart, source_parts

CHUNK = 256
"""Prompts that are encoded together."""


class Mixture(Sequence):
    """The records of sources, counted through. Those of a source with a name say it.

    Attributes:
        parts: which sources. sources: their records.
        starts: the number of the first record of each, and of all of them.
        left_out: of each the prompts that were too long.
    """

    def __init__(self, parts: Sequence[SourcePart], sources: Sequence[Records],
                 left_out: Sequence[int]) -> None:
        self.parts, self.sources, self.left_out = parts, sources, left_out
        self.starts = [0, *itertools.accumulate(map(len, sources))]

    def __len__(self) -> int:
        return self.starts[-1]

    def part(self, number: int) -> int:
        """Which source a record is of."""
        return bisect.bisect_right(self.starts, number) - 1

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        part = self.part(number)
        record = self.sources[part][number - self.starts[part]]
        name = self.parts[part].name
        if name and SOURCE_NAME in record:
            raise InputError(f"{self.where(number)}: the key {SOURCE_NAME!r} is taken: of several "
                             "sources rewards are told the prompt's by it; rename it")
        return {**record, SOURCE_NAME: name} if name else record

    def where(self, number: int) -> str:
        part = self.part(number)
        return self.sources[part].where(number - self.starts[part])

    def digest(self, numbers: Sequence[int] | np.ndarray) -> str:
        numbers = np.asarray(numbers, np.int64)
        digests = [source.digest(numbers[(start <= numbers) & (numbers < stop)] - start)
                   for source, start, stop in zip(self.sources, self.starts, self.starts[1:],
                                                  strict=False)]
        return digests[0] if len(digests) == 1 else hashlib.sha256(
            "".join(digests).encode()).hexdigest()[:16]

    def at_once(self) -> tuple[list[range], list[range]]:
        """Of each source the records that a start looks at before anything else, and its others."""
        seen = [min(source.at_once, len(source)) for source in self.sources]
        starts = self.starts
        return ([range(start, start + count) for start, count in zip(starts, seen, strict=False)],
                [range(start + count, stop)
                 for start, count, stop in zip(starts, seen, starts[1:], strict=False)])


    def said_of_left_out(self, limit: int) -> str:
        """How many prompts are over the limit of tokens, of each source that has a name; "": none
        are."""
        each = ", ".join(f"{count} of {part.name}" for part, count in
                         zip(self.parts, self.left_out, strict=True) if part.name and count)
        return (f"prompts over data.max_prompt_tokens={limit} left out (data.too_long): "
                + (each or str(sum(self.left_out)))) if any(self.left_out) else ""


def load_mixture(config: DataSection, tokenizer: Any, seed: int, setting: str = "data.source",
                 held_out: bool = False) -> Mixture:
    """The records of all sources of a section, without those that are too long where it says so.
    Arguments and errors are those of `records.load_records`, and `source_parts`' own."""
    parts = source_parts(config, setting)
    every = [read_records(part.data, seed, part.key) for part in parts]
    made = divided(every, config.held_out, seed, held_out)
    if config.too_long != "skip":
        return Mixture(parts, made, [0] * len(parts))
    short = [short_enough(part, source, tokenizer)
             for part, source in zip(parts, made, strict=True)]
    return Mixture(parts, short, [len(source) - len(kept)
                                  for source, kept in zip(made, short, strict=True)])


def short_enough(part: SourcePart, records: Records, tokenizer: Any) -> Selected:
    """The records whose prompts are not too long. What cannot be encoded stays, to be named
    later."""
    config, kept, count = part.data, [], len(records)
    for begin in range(0, count, CHUNK):
        chunk = range(begin, min(begin + CHUNK, count))
        try:
            lengths = [len(tokens) for tokens in encode_prompts(
                tokenizer, [records[number]["prompt"] for number in chunk],
                config.system_prompt, config.chat_template)]
        except Exception:
            lengths = [0] * len(chunk)
        kept += [number for number, length in zip(chunk, lengths, strict=True)
                 if length <= config.max_prompt_tokens]
    if not kept:
        raise InputError(f"all {count} prompts of {part.label} are over "
                         f"data.max_prompt_tokens={config.max_prompt_tokens}; raise the limit")
    return Selected(records, kept)
