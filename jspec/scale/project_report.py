"""What `jspec project` says: tables, and the same as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from jspec.scale.chips import GIB
from jspec.scale.cycle_cost import Decoding
from jspec.scale.project import Answers, Cell, Projection, cycles, pays_from

FLOOR = "expect 1.2 to 2 times it"
BEST = "*"
COLUMNS = 8
"""Of ks in a table: more are not read, and not all screens hold them."""


@dataclasses.dataclass(frozen=True)
class Projected:
    """One machine's projection, and what it rests on.

    Attributes:
      policy, on: names, of the model and of the machine.
      lengths: float [N], of answers.
      rows: cells, a row for each of `levels`: acceptances, or tokens a cycle.
      measured: what overhead and draft were measured on, in words; "": nothing was measured.
      rest_from: where the rest's seconds are from, in words.
      held: bytes of a device that a rollout holds at the least.
    """

    policy: str
    on: str
    decoding: Decoding
    answers: Answers
    lengths: np.ndarray
    projection: Projection
    levels: tuple[float, ...]
    rows: list[list[Cell | None]]
    measured: str
    rest_from: str
    held: float

    @property
    def level(self) -> str:
        """What differs from row to row."""
        given = next(cell for row in self.rows for cell in row if cell)
        return "tokens a cycle" if given.acceptance is None else "acceptance"

    @property
    def ks(self) -> list[int]:
        return list(self.projection.drafting)

    def best(self) -> Cell:
        """Of the whole table, by the step and then by the rollout."""
        return max((cell for row in self.rows for cell in row if cell),
                   key=lambda cell: (cell.step, cell.rollout))


PARTS = ("weights", "keys, values", "operations", "sent", "draft", "beyond", "cycle")
"""A cycle's seconds. Bytes (the first two) and operations overlap."""


def parts(projected: Projected, k: int) -> list[float]:
    """Seconds as `PARTS` names them: means over the cycles of a rollout."""
    found, weight = cycles(projected.decoding, projected.answers, k), projected.answers.spans.tokens
    verify = found.verify
    return [float(np.average(np.broadcast_to(part, weight.shape), weights=weight)) for part in (
        verify.weights, verify.key_values, verify.operations, verify.collectives, found.draft,
        found.overhead, found.seconds)]


def cycle_table(projected: Projected) -> Table:
    table = Table("k", *PARTS, title="a cycle, mean over a rollout, ms")
    for k in (0, *projected.ks):
        spent = parts(projected, k)
        table.add_row(str(k), *(f"{1e3 * seconds:.3g}" for seconds in spent))
    return _right(table)


def speedup_tables(projected: Projected, what: str) -> list[Table]:
    """what: "rollout" or "step", whose speed-ups; the best of a row is marked. A table for every
    `COLUMNS` ks."""
    ks, tables = projected.ks, []
    for begin in range(0, len(ks), COLUMNS):
        of = slice(begin, begin + COLUMNS)
        table = Table(projected.level, *(f"k = {k}" for k in ks[of]),
                      title=f"{what}: times faster")
        for level, row in zip(projected.levels, projected.rows, strict=True):
            speeds = [getattr(cell, what) if cell else None for cell in row]
            best = max((speed for speed in speeds if speed), default=None)
            shown = ("-" if speed is None else f"{speed:.2f}{BEST * (speed == best)}"
                     for speed in speeds[of])
            table.add_row(f"{level:g}", *shown)
        if what == "rollout":
            table.add_section()
            table.add_row("pays from", *map(_break_even(projected), ks[of]))
        tables.append(_right(table))
    return tables


def _break_even(projected: Projected) -> Any:
    def of(k: int) -> str:
        if projected.level == "acceptance":
            found = pays_from(projected.projection, k)
            return "never" if found is None else f"{found:.2f}"
        return f"{projected.projection.cost(k):.2f}"

    return of


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def said(projected: Projected) -> list[str]:
    """What stands above the tables: what is projected, and what it rests on."""
    decoding, found, lengths = projected.decoding, projected.projection, projected.lengths
    split = decoding.split
    over = f" on {split.tensor} devices each" if split.tensor > 1 else ""
    experts = f", experts over {split.expert} of them" if split.expert > 1 else ""
    late = {0: "one after the other"}.get(found.lag, f"at the same time, lag {found.lag}")
    basis = f"Projected; nothing here was measured. Seconds are a floor: {FLOOR}."
    if projected.measured:
        basis = ("Projected. Of it measured, what a cycle takes beyond its floor: "
                 f"{projected.measured}.")
    return [f"{projected.policy} on {projected.on}: {split.devices} x {decoding.chip.name}, rows "
            f"over {split.batch} shards{over}{experts}; {len(lengths):,} answers, "
            f"{lengths.mean():,.0f} tokens on average, {lengths.max():,.0f} at most.", basis,
            f"Without a draft: rollout {found.generation:.3g} s, the rest {found.rest:.3g} s "
            f"({projected.rest_from}), {late}; generation is {found.share:.0%} of the work.",
            *_too_much(projected)]


def _too_much(projected: Projected) -> list[str]:
    chip, held = projected.decoding.chip, projected.held
    if held <= chip.granted_bytes:
        return []
    return [f"Of a machine that is too small: a rollout's weights, keys and values take "
            f"{held / GIB:.0f} GiB a device at their fullest, and there are "
            f"{chip.granted_bytes / GIB:.0f}. Lower rollout.slots or rollout.kv_tokens, or split "
            "weights more ways; `jspec fit` counts all."]


def summary(projected: Projected) -> str:
    best, bound = projected.best(), projected.projection.bound
    level = (f"{best.tokens:g} tokens a cycle" if best.acceptance is None
             else f"acceptance {best.acceptance:g}")
    most = (f"at most {bound:.3g}x, were rollouts to take no time" if bound < np.inf
            else "without the rest, nothing but the rollout bounds it")
    return (f"{BEST} is the best k of its row. Best of all: k = {best.k} at {level}, rollout "
            f"{best.rollout:.2f}x, step {best.step:.2f}x ({most}).")


def as_data(projected: Projected) -> dict[str, Any]:
    """What `--json` writes."""
    decoding, found = projected.decoding, projected.projection
    return {
        "policy": projected.policy, "on": projected.on, "chip": decoding.chip.name,
        "projected": True, "measured": projected.measured or None, "rest_from": projected.rest_from,
        "split": dataclasses.asdict(decoding.split),
        "held_bytes": projected.held, "granted_bytes": decoding.chip.granted_bytes,
        "overhead": dataclasses.asdict(decoding.overhead),
        "answers": len(projected.lengths), "tokens": float(projected.lengths.sum()),
        "longest": float(projected.lengths.max()), "lag": found.lag,
        "seconds": {"prompts": found.prompts, "decoding": found.plain, "rest": found.rest},
        "cycles": [{"k": k, **dict(zip(PARTS, parts(projected, k), strict=True))}
                   for k in (0, *projected.ks)],
        "costs": {str(k): found.cost(k) for k in projected.ks},
        "pays_from": {str(k): pays_from(found, k) for k in projected.ks},
        "cells": [dataclasses.asdict(cell) for row in projected.rows for cell in row if cell]}


def machines_table(all_of: Sequence[Projected]) -> Table:
    """One line for each machine."""
    table = Table("on", "devices", "rollout, s", "rest, s", "best k", "rollout", "step",
                  title="each machine's best cell")
    for projected in all_of:
        best, found = projected.best(), projected.projection
        devices, seconds = projected.decoding.split.devices, (found.generation, found.rest)
        table.add_row(projected.on, str(devices), *(f"{s:.3g}" for s in seconds), str(best.k),
                      f"{best.rollout:.2f}x", f"{best.step:.2f}x")
    return _right(table)
