"""What a compiled program does on one device, counted in its text by phase: operations, bytes of
memory, collectives.

The body of a loop counts as often as the loop turns: known where it counts to a constant, else
given by whoever knows it. (XLA's own cost analysis counts it once, and kernels only as far as they
say.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from jspec.hlo import COLLECTIVES, Instruction, groups
from jspec.profiling import Phase, phases_of_program
from jspec.scale.products import operations
from jspec.scale.traffic import Pool, Program, sizes, traffic

Turns = Callable[[Instruction], float]
"""How often a loop turns whose text does not say it."""
_HANDED_ON = {"copy-done", "slice-done", "dynamic-slice-done", "async-done", "bitcast",
              "custom-call"}
_SINGLE = {
    "reduce",
    "reduce-window",
    "sort",
    "scatter",
    "select-and-scatter",
    "map",
    "all-reduce",
    "reduce-scatter",
    "all-reduce-start",
}  # what they call is one operation of theirs


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind: its opcode. bytes: of the whole array. group: one of its groups of devices, by
    number."""

    kind: str
    bytes: int
    group: tuple[int, ...]


@dataclasses.dataclass
class Count:
    """Of one phase, on one device.

    Attributes:
      operations: of matrix products. bytes: read and written in the device's memory.
      collectives: how many of each.
      attended: by (rows, KV heads, queries of each, head_dim), how often a kernel attends to
        a pool: what it reads of it follows from how long rows are, and is not in `bytes` and
        `operations`.
    """

    operations: float = 0.0
    bytes: float = 0.0
    collectives: dict[Collective, float] = dataclasses.field(
        default_factory=lambda: defaultdict(float)
    )
    attended: dict[tuple[int, ...], float] = dataclasses.field(
        default_factory=lambda: defaultdict(float)
    )


def counted(
    hlo: str,
    default: str,
    turns: Turns,
    devices: int,
    pool: Pool = lambda shape: False,
    experts: int = 0,
) -> dict[Phase, Count]:
    """Every phase of a compiled program.

    Args:
      hlo: its text. default: the phase of what belongs to none. devices: that it runs on.
      pool: see `traffic.Pool`. experts: see `products.grouped`.
    """
    program = Program.of(hlo, pool)
    phases, often = phases_of_program(hlo, default), repeats(program, turns)
    waiting = fetched_for(program, phases)
    inside = {
        name for one in program.found.values() if one.opcode == "fusion" for name in one.called
    }
    counts: dict[Phase, Count] = defaultdict(Count)
    for name, one in program.found.items():
        times = often.get(one.computation, 0.0)
        if not times or name not in phases:
            continue
        count = counts[waiting.get(name, phases[name])]
        if one.opcode.removesuffix("-start") in COLLECTIVES and not _continued(one):
            _collect(count, one, program, devices, times)
        elif attention := _attention(one, program, phases[name].loop):
            count.attended[attention] += times
        else:
            count.operations += times * operations(one, program.found, experts)
        if one.computation not in inside:
            count.bytes += times * traffic(one, program)
    return dict(counts)


def fetched_for(program: Program, phases: Mapping[str, Phase]) -> dict[str, Phase]:
    """The phase of what a transfer brings to the chip, of every one that was begun: that of the
    first operation that takes it, wherever the compiler has put its beginning."""
    users: dict[str, list[str]] = defaultdict(list)
    for name, one in program.found.items():
        for operand in one.operands:
            users[operand].append(name)
    found = {}
    for name, one in program.found.items():
        if not one.opcode.endswith("-start"):
            continue
        level = users[name]
        while level and name not in found:
            takers = [user for user in level if "/" in program.found[user].scope and user in phases]
            if takers:
                found[name] = phases[takers[0]]
            level = [after for user in level if program.found[user].opcode in _HANDED_ON
                     for after in users[user]]
    return found


def repeats(program: Program, turns: Turns) -> dict[str, float]:
    """How often each computation runs."""
    callers: dict[str, list[tuple[str, float]]] = defaultdict(list)
    single: set[str] = set()
    for one in program.found.values():
        if one.opcode in _SINGLE:
            single.update(one.called)
            continue
        times = 1.0
        if one.opcode == "while":
            known = turns_of(one, program)
            times = turns(one) if known is None else known
        for name in one.called:
            callers[name].append((one.computation, times))
    often: dict[str, float] = dict.fromkeys(single - callers.keys(), 0.0)

    def times_of(name: str) -> float:
        if name not in often:
            often[name] = (
                sum(times * times_of(by) for by, times in callers[name]) if name in callers else 1.0
            )
        return often[name]

    for name in program.members:
        times_of(name)
    return often


def turns_of(loop: Instruction, program: Program) -> float | None:
    """How often a loop turns that counts from 0 to a constant; None: that is data."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", loop.text):
        return float(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    members = program.members.get(condition.group(1), {}) if condition else {}
    tests = [one for one in members.values() if one.opcode == "compare"]
    if len(tests) != 1 or any(one.opcode == "fusion" for one in members.values()):
        return None
    ends = [
        one
        for one in (members.get(name) for name in tests[0].operands)
        if one and one.opcode == "constant"
    ]
    number = re.match(r"\d+", ends[0].text) if len(ends) == 1 else None
    return float(number.group()) if number else None


def _continued(one: Instruction) -> bool:
    """Whether this is not the first of the fusions that a TPU spreads one collective over."""
    said = re.search(r'"flag_start":"(-?\d+)"', one.text)
    return bool(said) and said.group(1) != "-1"


def _collect(count: Count, one: Instruction, program: Program, devices: int, times: float) -> None:
    made = sum(sizes(one.made, here=False))
    read = sum(sum(sizes(operand.made, here=False)) for operand in program.operands(one))
    if one.opcode.endswith("-start") and one.made.startswith("("):
        made -= read  # it names its operands as results too
    group = max(groups(one, devices), key=len)
    if len(group) > 1:
        count.collectives[
            Collective(one.opcode.removesuffix("-start"), max(made, read), group)
        ] += times


def _attention(one: Instruction, program: Program, rows: int) -> tuple[int, ...] | None:
    """(rows, KV heads, queries of each, head_dim) of a kernel that attends to a pool, in a loop of
    so many rows."""
    if one.opcode != "custom-call" or "verify_attention" not in one.scope or not rows:
        return None
    pools = [shape for operand in program.operands(one) for shape in operand.shapes[:1]
             if program.pool(shape)]
    made = [shape for shape in one.shapes if not program.pool(shape)]
    if not pools or not made:
        return None
    _, heads, _, size = pools[0]
    return rows, heads, math.prod(made[0]) // (rows * heads * size), size


def added(counts: Iterable[Mapping[Phase, Count]]) -> dict[Phase, Count]:
    """Counts of several programs as one."""
    total: dict[Phase, Count] = defaultdict(Count)
    for by_phase in counts:
        for phase, count in by_phase.items():
            to = total[phase]
            to.operations, to.bytes = to.operations + count.operations, to.bytes + count.bytes
            for collective, times in count.collectives.items():
                to.collectives[collective] += times
            for shape, times in count.attended.items():
                to.attended[shape] += times
    return dict(total)
