"""A compiled program's text (`compiled.as_text()`), read: its instructions, and which of them run
in its loops."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast",
               "collective-permute", "ragged-all-to-all", "reduce-scatter", "send", "recv")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_PAIRS = re.compile(r'source_target_pairs="?\{(.*?)\}\}')
_LISTED = re.compile(r"replica_groups=\{(?:\{(.*?)\})?\}")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a compiled program.

    Attributes:
      made: the type of its result, such as 'f32[8,128]{1,0:T(8,128)}', or of several in
        parentheses.
      opcode, operands: what makes it, of which instructions' results.
      scope: JAX's name of the operation, such as 'jit(f)/decode/while/body/verify/dot', or empty.
      called: the computations that it calls or has fused into it. computation: the one that it is a
        part of.
      text: all that follows its opcode.
    """

    made: str
    opcode: str
    operands: tuple[str, ...]
    scope: str
    called: tuple[str, ...]
    computation: str
    text: str

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of its results."""
        return tuple(tuple(map(int, filter(None, dims.split(","))))
                     for dims in _ARRAY.findall(self.made))


def instructions(hlo: str) -> dict[str, Instruction]:
    """Every instruction of a program by its name."""
    found, computation = {}, ""
    for line in hlo.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            header = _COMPUTATION.match(line)
            computation = header.group(1) if header else computation
            continue
        name, made, opcode, rest = match.groups()
        scope = _OP_NAME.search(rest)
        called = tuple(one or many.replace("%", "") for one, many in _CALLED.findall(rest))
        called = tuple(part.strip() for names in called for part in names.split(","))
        operands = tuple(_NAME.findall(rest.partition(")")[0]))
        found[name] = Instruction(made, opcode, operands, scope.group(1) if scope else "", called,
                                  computation, rest)
    return found


def within(found: Mapping[str, Instruction], names: Iterable[str]) -> dict[str, Instruction]:
    """The instructions that those of these names run: of the computations that they call, and of
    what these call."""
    members: dict[str, list[str]] = {}
    for name, one in found.items():
        members.setdefault(one.computation, []).append(name)
    seen: dict[str, None] = {}
    level = [called for name in names for called in found[name].called]
    while level:
        new = [name for called in dict.fromkeys(level) if called not in seen
               for name in members.get(called, ())]
        seen.update(dict.fromkeys(level))
        level = [called for name in new for called in found[name].called]
    return {name: found[name] for computation in seen for name in members.get(computation, ())}


def groups(one: Instruction, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices, by number, that a collective joins. Raises ValueError where its text
    says it in a way that is not known here."""
    def lists(text: str) -> list[tuple[int, ...]]:
        return [tuple(map(int, re.findall(r"\d+", group))) for group in text.split("}")]

    if pairs := _PAIRS.search(one.text):
        return lists(pairs.group(1))
    if mesh := _MESH.search(one.text):
        return _of_mesh(*mesh.groups())
    if iota := _IOTA.search(one.text):
        shape, reshaped, order = (tuple(map(int, part.split(","))) if part else None
                                  for part in iota.groups())
        numbers = np.arange(math.prod(reshaped)).reshape(reshaped)
        numbers = numbers if order is None else numbers.transpose(order)
        return [tuple(map(int, group)) for group in numbers.reshape(shape)]
    if listed := _LISTED.search(one.text):
        return [tuple(range(devices))] if listed.group(1) is None else lists(listed.group(1))
    raise ValueError(f"a collective whose groups cannot be read: {one.opcode}({one.text}")


def _of_mesh(mesh: str, order: str | None, over: str) -> list[tuple[int, ...]]:
    """Groups over axes of a mesh: 'a'=4,'b'=8 and 'b', or of an axis a part, 'b':(2)4, after 2 of
    its devices and of 4. order: of its devices, [8,4]T(1,0) or their numbers."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    wanted = [(name, int(before or 1), int(size or sizes[name]))
              for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over)]
    shape: list[int] = []
    joined: list[int] = []
    for name, size in sizes.items():
        cuts = sorted((before, part) for axis, before, part in wanted if axis == name)
        done = 1
        for before, part in cuts:
            shape += [before // done, part]
            joined.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    numbers = np.arange(math.prod(sizes.values()))
    if order and (turned := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)):
        dims, axes = (tuple(map(int, part.split(","))) if part else None
                      for part in turned.groups())
        numbers = numbers.reshape(dims).transpose(axes).ravel()
    elif order:
        numbers = np.array([int(number) for number in re.findall(r"\d+", order)])
    numbers = numbers.reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in joined]
    table = numbers.transpose(*rest, *joined).reshape(-1, math.prod(shape[i] for i in joined))
    return [tuple(map(int, group)) for group in table]
