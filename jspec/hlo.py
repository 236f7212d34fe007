"""A compiled program's text (`compiled.as_text()`), read: its instructions, and which of them run
in its loops."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")


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
