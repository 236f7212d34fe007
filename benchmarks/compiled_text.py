"""What a compiled rollout does in its decode loops, read in its text: collectives, and what becomes
of the pool."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jspec.hlo import COLLECTIVES, Instruction, groups, instructions, within

IN_PLACE = {"async-done", "async-start", "async-update", "bitcast", "call", "conditional",
            "dynamic-update-slice", "dynamic-update-slice-start", "fusion", "get-tuple-element",
            "opt-barrier", "parameter", "scatter", "tuple", "while"}
"""What may have a pool as its result and does not write all of it: it hands one on, or updates a
part where it lies (else XLA's copy insertion puts a copy beside it). Of a call or a fusion it is
what lies inside that is looked at."""
_ARRAY = re.compile(r"\w+\[([\d,]+)\](\{[^}]*\})?")


def in_loops(found: Mapping[str, Instruction], scope: str = "/loop_") -> dict[str, Instruction]:
    """What runs again and again in the loops of that scope: the bodies and tests of every `while`
    that has it, or has something inside that does, and what those call."""
    loops = [name for name, one in found.items() if one.opcode == "while" and (
        scope in one.scope
        or any(scope in inner.scope for inner in within(found, [name]).values()))]
    return within(found, loops)


def crossing(loops: Mapping[str, Instruction], shards: Sequence[int]) -> list[str]:
    """The collectives among these instructions that join devices of different shards of the batch;
    shards[d] is that of device d, as the mesh counts them."""
    return [f"{name}: {one.opcode} of {groups(one, len(shards))}, {one.scope}"
            for name, one in loops.items() if one.opcode.removesuffix("-start") in COLLECTIVES
            and any(len({shards[device] for device in group}) > 1
                    for group in groups(one, len(shards)))]


def gathered(loops: Mapping[str, Instruction]) -> list[str]:
    """The collectives among these instructions by which attention is more than each shard's heads:
    all but the sums that its output projection ends with."""
    return [f"{name}: {one.opcode} of {one.made}, {one.scope}" for name, one in loops.items()
            if "/attention/" in one.scope and one.opcode.removesuffix("-start") in set(COLLECTIVES)
            - {"all-reduce"}]


def pools(found: Mapping[str, Instruction], block: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shapes of pools, any number of blocks of that shape, that a `while` carries: those on the
    device, and what holds paused rows in host memory."""
    return {shape for one in found.values() if one.opcode == "while" for shape in one.shapes
            if len(shape) == len(block) + 1 and shape[1:] == block}


def of_size(found: Mapping[str, Instruction],
            pools: Iterable[tuple[int, ...]]) -> dict[str, Instruction]:
    """The instructions that make an array of as many elements as a pool has, whatever its shape.
    What begins a transfer names what it reads as a result too: it must make one more."""
    sizes = {math.prod(shape) for shape in pools}

    def count(one: Instruction) -> int:
        return sum(math.prod(shape) in sizes for shape in one.shapes)

    def makes(one: Instruction) -> bool:
        read = (count(found[name]) for name in one.operands if name in found)
        return count(one) > (sum(read) if one.opcode.endswith("-start") else 0)

    return {name: one for name, one in found.items() if makes(one)}


def copied(found: Mapping[str, Instruction], pools: Iterable[tuple[int, ...]]) -> list[str]:
    """What writes a whole pool among these instructions: a copy of it, a select over it, a
    transpose, a conversion. A kernel must say that it writes where its operand lies."""
    return [f"{name}: {one.made} {one.opcode}, {one.scope}" for name, one in of_size(found, pools)
            .items() if one.opcode not in IN_PLACE and not one.opcode.endswith("-done")
            and not (one.opcode == "custom-call" and "output_to_operand_aliasing" in one.text)]


def moved(found: Mapping[str, Instruction]) -> set[tuple[int, ...]]:
    """The shapes of what these instructions move to host memory (S(5) in a program's text) or
    back."""
    transfers = (one for one in found.values()
                 if "S(5)" in one.made and (one.opcode == "copy" or one.opcode.endswith("-start")))
    return {tuple(map(int, dims.split(","))) for one in transfers
            for dims, layout in _ARRAY.findall(one.made) if "S(5)" not in layout}


def read(hlo: str, block: tuple[int, ...], shards: Sequence[int]) -> dict[str, Any]:
    """What is to be known of a compiled rollout.

    Args:
      block: the shape of a block of the pool on a device, [kv_heads, size, head_dim].
      shards: of every device, its shard of the batch.

    Returns: `pools`, their shapes; `loops`, the rows of the decode loops; `crossing`, the
    collectives in them that cross the batch's shards; `gathered`, those with which attention is not
    tensor-parallel; `copied`, what copies a pool in them; `moved`, the shapes of what they move to
    host memory or back; `copied_outside`, how many copies of one there are outside of them, which
    are made once a rollout.
    """
    found = instructions(hlo)
    loops, shapes = in_loops(found), pools(found, block)
    rows = {int(n) for one in found.values() for n in re.findall(r"/loop_(\d+)/", one.scope)}
    outside = {name: one for name, one in found.items() if name not in loops}
    return {"pools": sorted(shapes), "loops": sorted(rows, reverse=True),
            "crossing": crossing(loops, shards), "gathered": gathered(loops),
            "copied": copied(loops, shapes), "moved": sorted(moved(loops)),
            "copied_outside": sum(one.opcode in ("copy", "copy-start")
                                  for one in of_size(outside, shapes).values())}
