"""How much more of a step would fit: sums over what was compiled, themselves not compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jspec.scale.memory import Pools


@dataclasses.dataclass(frozen=True)
class Largest:
    """The most that fits, everything else being as configured; 0: not even the least does.

    Attributes:
      slots: rows in flight over all devices, of the step's. kv_tokens: positions of keys and values
        over all devices; None: as many as the slots can need at worst. micro_batch: rows.
    """

    slots: int
    kv_tokens: int | None
    micro_batch: int


def largest(
    programs: Mapping[str, Any],
    pools: Pools,
    micro_batch: int,
    rows: int,
    shards: int,
    fixed: int,
    granted: int,
) -> Largest:
    """Of programs (`fit.Program`) by name.

    Args:
      micro_batch: rows that were compiled. rows: of the step. shards: that split them in training.
      fixed: bytes of the update's temporaries that do not grow with its rows: gradients.
      granted: bytes of a device.
    """
    rollout, update = programs["rollout"], programs["update"]
    here = sum(pools.bytes()[:2])
    moving = rollout.kinds["temporaries"]

    def of_slots(slots: int) -> float:
        pool = sum(pools.bytes(slots=slots)[:2])
        return rollout.needed - here + pool + moving * (slots / pools.slots - 1)

    growing = max(update.kinds["temporaries"] - fixed, 0)

    def of_micro_batch(asked: int) -> float:
        return update.needed + growing * (asked / micro_batch - 1)

    steps = list(range(pools.shards, rows + 1, pools.shards))
    divisors = [n for n in range(1, rows + 1) if rows % n == 0 and n % shards == 0]
    return Largest(
        _most(steps, of_slots, granted),
        _tokens(pools, granted - rollout.needed + here),
        _most(divisors, of_micro_batch, granted),
    )


def _most(candidates: list[int], needed: Callable[[int], float], granted: int) -> int:
    """The largest of ascending candidates that fits, 0 if none does."""
    return max((n for n in candidates if needed(n) <= granted), default=0)


def _tokens(pools: Pools, room: int) -> int | None:
    """Positions of all shards that a pool of `room` bytes on each device holds."""
    counts, block = pools.counts, sum(pools.block_bytes)
    blocks, (worst, _) = (
        max(room, 0) // block,
        counts.pool(pools.slots // pools.shards, None, pools.shards),
    )
    if blocks >= worst:
        return None
    least = counts.prompts + counts.row
    return blocks * counts.size * pools.shards if blocks >= least else 0
