"""The chain of decode loops: each is compiled for a number of rows and drafts its own k; the next
is entered when the live rows fit. A cycle so costs what its live rows cost, in steps.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jspec.drafts.base import Draft
from jspec.kernels import platform
from jspec.model import Policy
from jspec.sharding import agreed
from jspec.speculate.cycle import cycle
from jspec.speculate.pausing import pause, resume
from jspec.speculate.state import State, admit, compact, end, grow, retire, rows_in_slots
from jspec.speculate.types import NOISE, Sampling, Schedule

FEWEST, FEWEST_ON_CHIPS = 1, 16
"""Rows of the last loop, on a CPU and on accelerators: on chips fewer cost the same, the weights'
bytes; on a CPU a cycle of four rows takes 1.5 times as long as one of a single row."""
SHRINK, MOST = 3, 4
"""By what the rows of a loop shrink, about, and how many loops there are at most: each one is
compiled, and the first few save most of what dead rows cost."""
LONG = 128
"""Generated tokens from which on more than one loop is worth compiling."""


def loops(slots: int, k: int | Schedule, cap: int,
          fewest: int | None = None) -> tuple[tuple[int, int], ...]:
    """(rows, k) of every loop, of ever fewer rows. A schedule's own bounds are the loops; for one k
    they are chosen.

    cap: the most that a sequence generates. fewest: rows of the last loop; None: what this
      platform wants.
    """
    if not isinstance(k, int):
        bounds = dict(k)
        sizes = sorted({slots, *(rows for rows in bounds if rows < slots)}, reverse=True)
        return tuple((rows, next((bounds[b] for b in sorted(bounds) if b >= rows), 0))
                     for rows in sizes)
    if fewest is None:
        fewest = FEWEST if platform() == "cpu" else FEWEST_ON_CHIPS
    worth_it = cap >= LONG and slots > 2 * fewest
    steps = min(MOST - 1, round(math.log(slots / fewest, SHRINK))) if worth_it else 0
    ratio = (slots / fewest) ** (1 / max(steps, 1))
    return tuple((math.ceil(slots / ratio**i - 1e-9), k) for i in range(steps + 1))


def decode(policy: Policy, draft: Draft | None, state: State, key: jax.Array,
           chain: tuple[tuple[int, int], ...], *, sampling: Sampling, stop_tokens: tuple[int, ...],
           rule: str, depths: tuple[int, ...] | None, groups: int | None) -> State:
    """Run the loops until every sequence is done, or all those of so many `groups` are.

    Args:
      draft: prepared. state: with the slots of the chain's first loop. key: raw, of the batch.
      depths: see `Speculation`.
    """
    most = max(k for _, k in chain)
    refill = len(state.waiting) > len(state.slots) or state.paused is not None
    state = admit(state, most)
    for i, (rows, k) in enumerate(chain):
        fit = chain[i + 1][0] if i + 1 < len(chain) else 0
        if i:
            state = compact(state, rows)

        def body(state: State, i: int = i, k: int = k) -> State:
            state = grow(pause(state, most), most)
            with jax.named_scope("noise"):
                at = rows_in_slots(state)
                noise = NOISE[rule](key, at.ids, at.lengths, k)
            live = state.live.sum(dtype=jnp.int32)
            state, *_ = cycle(policy, draft, state, noise, sampling=sampling,
                              stop_tokens=stop_tokens, k=k, depths=depths)
            counts = state.counts
            counts = counts.replace(loop_cycles=counts.loop_cycles.at[i].add(1),
                                    loop_live=counts.loop_live.at[i].add(live))
            state = retire(state.replace(counts=counts))
            if groups is not None:
                state = end(state, groups)
            state = resume(state, most)
            # the first loop goes on until no sequence waits
            return admit(state, most) if refill and i == 0 else state

        def goes_on(state: State, fit: int = fit) -> Any:
            return state.more | (state.in_flight > fit)

        def turn(carry: tuple[State, jax.Array], body: Any = body,
                 goes_on: Any = goes_on) -> tuple[State, jax.Array]:
            state = body(carry[0])
            return state, agreed(goes_on(state))

        with jax.named_scope(f"loop_{rows}"):
            # what is agreed on is a part of the carry: a loop's test is no place for collectives
            state, _ = jax.lax.while_loop(lambda carry: carry[1], turn,
                                          (state, agreed(goes_on(state))))
    return state
