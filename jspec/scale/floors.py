"""The least that a phase can take: the longest of its operations, its bytes and its collectives, at
the chip's rates.

A floor and no forecast: programs take 1.2 to 2 times it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jspec.profiling import Phase
from jspec.scale.chips import HOP
from jspec.scale.counts import Collective, Count
from jspec.scale.topologies import Topology

_PASSES = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}
"""By how much a collective takes longer than an all-gather or a reduce-scatter of as many bytes."""


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds of a phase on one device, each part by itself, and what they follow from.

    Attributes:
      operations, bytes: of matrix products, and of memory. collective_bytes: of whole arrays.
      compute, memory: seconds. ici, dcn: of collectives within a slice, and of those between
        slices.
    """

    operations: float = 0.0
    bytes: float = 0.0
    collective_bytes: float = 0.0
    compute: float = 0.0
    memory: float = 0.0
    ici: float = 0.0
    dcn: float = 0.0

    @property
    def seconds(self) -> float:
        """The longest part."""
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def binds(self) -> str:
        """Which part that is."""
        parts = {
            "operations": self.compute,
            "memory": self.memory,
            "collectives": self.ici,
            "collectives (DCN)": self.dcn,
        }
        return max(parts, key=lambda name: parts[name])

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            *(
                a + b
                for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )

    def __mul__(self, times: float) -> Floor:
        return Floor(*(times * x for x in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Places:
    """Where devices lie: `at[i]` of device i, as the mesh counts them, its (slice, coordinates)."""

    topology: Topology
    at: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, topology: Topology, devices: Sequence[Any]) -> Places:
        return cls(
            topology,
            tuple(
                (getattr(d, "slice_index", 0) or 0, tuple(getattr(d, "coords", ()) or ()))
                for d in devices
            ),
        )

    def seconds(self, collective: Collective) -> tuple[float, float]:
        """(within slices, between them) of one collective."""
        places = [self.at[device] for device in collective.group]
        slices = len({where for where, _ in places})
        within = len(places) // slices
        passes, size = _PASSES.get(collective.kind, 1.0), collective.bytes
        dcn = 0.0
        if slices > 1:
            dcn = passes * size * (slices - 1) / slices / self.topology.chip.dcn_bandwidth / within
        return self._ici(
            collective.kind, [at for where, at in places if where == places[0][0]], size, passes
        ), dcn

    def _ici(self, kind: str, at: Sequence[tuple[int, ...]], size: int, passes: float) -> float:
        chip, count = self.topology.chip, len(at)
        if count == 1:
            return 0.0
        spans = [len(set(axis)) for axis in zip(*at, strict=True)] if at[0] else []
        shape, wraps = self.topology.shape, self.topology.wraps
        axes = [(n, wraps[i] and n == shape[i]) for i, n in enumerate(spans[: len(shape)]) if n > 1]
        ways = sum(2 if wrapped else 1 for _, wrapped in axes) or chip.links
        hops = sum(n // 2 if wrapped else n - 1 for n, wrapped in axes) or 1
        if kind == "collective-permute":
            return size / chip.link_bandwidth + HOP
        return passes * (size * (count - 1) / count / (ways * chip.link_bandwidth) + hops * HOP)


def floor(count: Count, places: Places, context: float) -> Floor:
    """Of what was counted. context: positions of a row whose keys and values a kernel reads."""
    chip = places.topology.chip
    operations, moved = count.operations, count.bytes
    for (rows, heads, queries, size), times in count.attended.items():
        moved += times * rows * heads * size * context * 2 * 2
        operations += times * 4 * rows * heads * queries * size * context
    ici = dcn = total = 0.0
    for collective, times in count.collectives.items():
        within, between = places.seconds(collective)
        ici, dcn, total = (
            ici + times * within,
            dcn + times * between,
            total + times * collective.bytes,
        )
    return Floor(
        operations, moved, total, operations / chip.bf16, moved / chip.hbm_bandwidth, ici, dcn
    )


def by_phase(
    counts: Mapping[Phase, Count], places: Places, context: float
) -> dict[tuple[str, int], Floor]:
    """Floors by (phase, rows of its loop), the parts of a phase together."""
    floors: dict[tuple[str, int], Floor] = {}
    for phase, count in counts.items():
        key = phase.name, phase.loop
        floors[key] = floors.get(key, Floor()) + floor(count, places, context)
    return floors


def total(floors: Mapping[Any, Floor]) -> Floor:
    """One after the other, each part summed."""
    return sum(floors.values(), Floor()) if floors else Floor(*(math.nan,) * 7)
