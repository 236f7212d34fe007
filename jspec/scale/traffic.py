"""Bytes of a device's memory that an instruction of a compiled program reads and writes, from the
program's text."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping

from jspec.hlo import Instruction, instructions

_TYPED = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"[a-z]+(\d+)")
_ELSEWHERE = re.compile(r"S\([1-9]")  # S(1): a TPU's vector memory; S(5): the host's
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "iota",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "domain",
    "async-start",
    "async-update",
    "async-done",
    "add-dependency",
}
_PARTS = {"dynamic-slice", "slice", "gather"}
_IN_PLACE = {"dynamic-update-slice", "scatter"}

Pool = Callable[[tuple[int, ...]], bool]
"""Whether an array of that shape is a pool of keys and values."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program's instructions by name. pool: what of it is counted by the rows that are
    alive."""

    found: Mapping[str, Instruction]
    pool: Pool = lambda shape: False

    @classmethod
    def of(cls, hlo: str, pool: Pool = lambda shape: False) -> Program:
        return cls(instructions(hlo), pool)

    @functools.cached_property
    def members(self) -> dict[str, dict[str, Instruction]]:
        """The instructions of every computation, its root last."""
        by_computation: dict[str, dict[str, Instruction]] = defaultdict(dict)
        for name, one in self.found.items():
            by_computation[one.computation][name] = one
        return by_computation

    def operands(self, one: Instruction) -> list[Instruction]:
        """What makes its operands."""
        return [self.found[name] for name in one.operands if name in self.found]


def sizes(made: str, here: bool = True) -> list[int]:
    """Bytes of each array of a type as the text has it; here: 0 for one that is not in the device's
    memory."""
    found = []
    for dtype, dims, layout in _TYPED.findall(made):
        bits = _BITS.match(dtype)
        size = 8 if dtype == "pred" else int(bits.group(1)) if bits else 0
        away = here and _ELSEWHERE.search(layout)
        found.append(0 if away else math.prod(map(int, filter(None, dims.split(",")))) * size // 8)
    return found


def traffic(one: Instruction, program: Program) -> float:
    """Bytes that an instruction moves: of what it takes a part of, or writes a part of, that
    part."""
    opcode, operands = one.opcode, program.operands(one)
    if (
        opcode in _FREE
        or opcode.endswith("-done")
        or (opcode == "custom-call" and "Bitcast" in one.text)
    ):
        return 0.0
    if opcode.endswith("-start"):
        return _moved(one)
    if opcode in _PARTS:
        part = sum(sizes(one.made, here=False))
        return min(sum(sizes(operands[0].made)), part) + sum(sizes(one.made))
    if opcode in _IN_PLACE:
        return _written(one, program)
    if opcode == "fusion":
        return _fused(one, operands, program)
    arrays = [*operands, one]
    return float(
        sum(
            size
            for array in arrays
            for size, shape in zip(sizes(array.made), array.shapes, strict=False)
            if not program.pool(shape)
        )
    )


def _moved(one: Instruction) -> float:
    """Of what begins a transfer between memories: as much as it moves, at each end that is in the
    device's memory."""
    arrays = [
        (size, here)
        for size, here in zip(sizes(one.made, here=False), sizes(one.made), strict=True)
        if size > 8
    ]
    if not arrays:
        return 0.0
    return float(min(size for size, _ in arrays) * min(2, sum(here > 0 for _, here in arrays)))


def _written(one: Instruction, program: Program) -> float:
    """Of an update in place: what it brings, read and written."""
    update = program.operands(one)[1 if one.opcode == "dynamic-update-slice" else -1]
    brought = sum(sizes(update.made, here=False))
    return float(sum(sizes(update.made)) + min(brought, sum(sizes(one.made))))


def _fused(one: Instruction, operands: list[Instruction], program: Program) -> float:
    """Of a fusion: what comes in and goes out; in between it stays on the chip."""
    members = program.members[one.called[0]] if one.called else {}
    users: dict[str, list[Instruction]] = defaultdict(list)
    for inner in members.values():
        for name in inner.operands:
            users[name].append(inner)
    parameters = {
        int(number.group()): name
        for name, inner in members.items()
        if inner.opcode == "parameter" and (number := re.match(r"\d+", inner.text))
    }
    total = 0.0
    for i, operand in enumerate(operands):
        total += (
            _taken(parameters[i], sum(sizes(operand.made)), users)
            if i in parameters
            else sum(sizes(operand.made))
        )
    ends = list(members.values())[-1:]
    if ends and ends[0].opcode == "tuple":
        ends = [members[name] for name in ends[0].operands if name in members]
    for end, size in zip(ends, sizes(one.made), strict=False):
        while end.opcode == "bitcast" and end.operands[0] in members:
            end = members[end.operands[0]]
        total += min(size, _brought(end, members)) if end.opcode in _IN_PLACE else size
    return total


def _taken(name: str, whole: int, users: Mapping[str, list[Instruction]], deep: int = 4) -> float:
    """Bytes of a fusion's operand that it reads."""
    total = 0.0
    for user in users[name]:
        first = user.operands[:1] == (name,)
        if first and user.opcode in _PARTS:
            total += sum(sizes(user.made, here=False))
        elif not (first and user.opcode in _IN_PLACE):
            return whole
    return min(whole, total)


def _brought(end: Instruction, members: Mapping[str, Instruction]) -> float:
    update = members.get(end.operands[1 if end.opcode == "dynamic-update-slice" else -1])
    return float(sum(sizes(update.made, here=False))) if update else math.inf
