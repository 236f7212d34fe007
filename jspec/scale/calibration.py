"""What cycles take beyond their floor, from a table that was measured: what `jspec bench cost
--json` wrote, in seconds; or speed-ups of rollouts by k, as others publish them, in plain cycles:

    {"source": "...", "on": "gb200-32",
     "measured": [{"k": 3, "tokens": 3.32, "speedup": 1.77}, ...]}

Without `on` they are of the machine that is asked about. A rollout is faster by tokens a cycle over
what a cycle costs: so each row says what one cost.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jspec import arguments
from jspec.errors import InputError
from jspec.scale.chips import CHIPS
from jspec.scale.cycle_cost import Decoding, Overhead, Split, cycle
from jspec.scale.project import Answers, decode_seconds, rollout_seconds
from jspec.speculate.schedule import Costs

SHAPES = ('{"source": "...", "measured": [{"k": 3, "tokens": 3.32, "speedup": 1.77}]}, or '
          "what `jspec bench cost MODEL --json FILE` writes")
KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
         "TPU7x": "tpu7x", "NVIDIA H100": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200",
         "NVIDIA GB200": "gb200"}
"""Chips by how JAX names a device; a GPU's name goes on."""
TIMED_CONTEXT = 1024
"""Positions by which `jspec bench cost` makes rows longer than their prompts, at most; half of the
cap where that is less."""


@dataclasses.dataclass(frozen=True)
class Speedup:
    """A measured rollout: `k` drafted tokens, `tokens` a cycle, how many times faster than without
    a draft."""

    k: int
    tokens: float
    speedup: float

    @property
    def cost(self) -> float:
        """Of a cycle, in plain ones."""
        return self.tokens / self.speedup


@dataclasses.dataclass(frozen=True)
class Measured:
    """A table. One of `speedups` and `table` is there.

    Attributes:
      source: what it is of, in words. on: the machine of the speed-ups; "": any.
      table: seconds by rows and k; `chip`, `devices`, `context` (positions of a row) of them.
    """

    source: str
    on: str = ""
    speedups: tuple[Speedup, ...] = ()
    table: Costs | None = None
    chip: str = ""
    devices: int = 1
    context: float = 0.0


def line(ks: Sequence[int], values: Sequence[float], size: Sequence[float]) -> tuple[float, float]:
    """(intercept, slope) of the line whose largest error, as a share of `size`, is the smallest
    (Lawson's algorithm: least squares, and again with more weight where it errs). With fewer than
    three points it goes through 0 at k = 0: two would say nothing of a line."""
    x, y, size = (np.asarray(part, float) for part in (ks, values, size))
    columns = np.stack([np.ones_like(x), x], 1)[:, len(set(ks)) < 3:]
    weight, found = np.full(len(x), 1 / len(x)), np.zeros(columns.shape[1])
    for _ in range(300):
        scale = np.sqrt(weight) / size
        found = np.linalg.lstsq(columns * scale[:, None], y * scale, rcond=None)[0]
        error = np.abs(y - columns @ found) / size
        if not error.max() > 1e-12:
            break
        weight = weight * error / (weight * error).sum()
    return (0.0, *found.tolist()) if len(found) == 1 else tuple(found.tolist())


def without_draft(decoding: Decoding) -> Decoding:
    """The floor of the verifier alone, to which what was measured of drafts is added."""
    return dataclasses.replace(decoding, draft=(), draft_share=None, overhead=Overhead())


def overhead_of(measured: Measured, decoding: Decoding, answers: Answers) -> Overhead:
    """What the table shows beyond `without_draft(decoding)`: the engine's overhead and the draft.
    answers: what its speed-ups are of."""
    bare = without_draft(decoding)
    if measured.table is not None:
        return from_table(measured, bare)
    return from_speedups(measured.speedups, bare, answers)


def from_speedups(speedups: Sequence[Speedup], decoding: Decoding, answers: Answers) -> Overhead:
    """With what overhead, in plain cycles, `decoding` without one takes for these answers what was
    measured."""
    plain, unit = rollout_seconds(decoding, answers), decode_seconds(decoding, answers)
    over = [(plain / point.speedup - rollout_seconds(decoding, answers, point.k, point.tokens))
            * point.tokens / unit for point in speedups]
    drafting, token = line([point.k for point in speedups], over,
                           [point.cost for point in speedups])
    return Overhead(0.0, drafting, token, min(point.k for point in speedups), relative=True)


def from_table(measured: Measured, decoding: Decoding) -> Overhead:
    """The overhead of a table's seconds over the floor of the same policy on the chip that it was
    measured on, a mean over its rows."""
    table = measured.table
    here = dataclasses.replace(decoding, chip=CHIPS[measured.chip],
                               split=Split(table.shards, max(1, measured.devices // table.shards)))

    def over(rows: int, k: int, seconds: float) -> float:
        return seconds - float(cycle(here, k, rows, rows * measured.context).seconds)

    plain = max(0.0, float(np.mean([over(rows, 0, seconds) for rows, seconds in table.plain])))
    drafting = [(k, over(rows, k, seconds) - plain, seconds)
                for rows, k, seconds in table.drafting if k]
    if not drafting:
        return Overhead(plain)
    ks, beyond, seconds = zip(*drafting, strict=True)
    return Overhead(plain, *line(ks, beyond, seconds), least=min(ks))


def read(name: str, drafter: str) -> Measured:
    """The table in a file; of `jspec bench cost`, that of a drafter. Raises InputError."""
    path = arguments.path("--costs", name)
    if not (path.is_file() or path.is_fifo()):
        raise InputError(f"--costs {name}: there is no such file; it holds {SHAPES}")
    try:
        found = json.loads(path.read_text())
        if "measured" in found:
            return _speedups(found)
        if not found["rows"]:
            raise ValueError
        return _table(name, found, drafter)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--costs {name} is no table of costs; it holds {SHAPES}") from None


def _speedups(found: dict[str, Any]) -> Measured:
    points = tuple(Speedup(int(row["k"]), float(row["tokens"]), float(row["speedup"]))
                   for row in found["measured"])
    if not points or not all(row["k"] == p.k >= 1 and 1 <= p.tokens <= p.k + 1
                             and 0 < p.speedup <= p.tokens
                             for row, p in zip(found["measured"], points, strict=True)):
        raise ValueError  # a cycle with a draft takes no less than one without
    return Measured(str(found["source"]), str(found.get("on", "")), points)


def _table(name: str, found: dict[str, Any], drafter: str) -> Measured:
    rows = {row["draft"].partition(":")[0]: row for row in found["rows"]}
    if drafter not in rows:
        raise InputError(f"--costs {name} was measured with {', '.join(rows)}, and the config's "
                         f"draft.name is {drafter}; measure that one: --drafts {drafter}")
    machine = found["machine"]
    chip = next((chip for kind, chip in sorted(KINDS.items(), reverse=True)
                 if machine["device"].startswith(kind)), None)
    if chip is None:
        raise InputError(f"--costs {name} was measured on {machine['device']!r}, whose floor is "
                         f"not known; measure on one of {', '.join(CHIPS)}")
    return Measured(f"{found['model']} on {machine['device']}, {found['date']}",
                    table=_costs(rows[drafter]["costs"]), chip=chip,
                    devices=int(machine["devices"]),
                    context=min(TIMED_CONTEXT, found["max_new_tokens"] / 2))


def _costs(fields: dict[str, Any]) -> Costs:
    """Raises ValueError or TypeError for what no cycle can have been measured to cost."""
    table = Costs.from_json(fields)
    plain = [(rows, 0, seconds) for rows, seconds in table.plain]
    counts = [table.shards, *(rows for rows, _, _ in [*plain, *table.drafting])]
    seconds = [spent for _, _, spent in [*plain, *table.drafting]]
    if not plain or min(counts) < 1 or not all(0 < spent < np.inf for spent in seconds):
        raise ValueError
    return table
