"""What happens when the pool has no more blocks: the youngest rows are paused, last in first out.

The blocks of a paused row go to a stack in host memory and come back when there is room. Its
prompt's full blocks stay where its siblings read them; its tokens are with the sequences; and what
a drafter keeps beside its blocks is little and stays on the device (a TPU moves no single numbers
to its host). Nothing is computed again. While a row is paused no other sequence gets a slot, so
those that are paused are always the youngest in flight; and the oldest row can always go on, since
the pool has room for one at its cap (`Blocks.check`).
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from jspec.drafts.base import DraftState
from jspec.model import Cache
from jspec.model.pool import blocks_of, copy_block, copy_entry, give_back, take
from jspec.speculate.state import Paused, State, fitting, own_blocks, shared_blocks, with_table

Place = TypeVar("Place", State, Paused)


def none_paused(cache: Cache, draft: DraftState | None, waiting: jax.Array, blocks: int) -> Paused:
    """The stack, empty, with room for so many blocks of such caches. waiting: int32 [N], as in
    `State`."""
    def away(x: jax.Array) -> jax.Array:
        # not zeros: those would be written to the device, and copied
        return jax.device_put(jax.lax.empty((blocks, *x.shape[1:]), x.dtype), jax.memory.Space.Host)

    def pool(cache: Cache | None) -> Cache | None:
        return None if cache is None else jax.tree.map(away, cache.replace(table=None))

    if draft is not None:
        draft = DraftState(jax.tree.map(jnp.zeros_like, draft.rows), pool(draft.cache))
    slots, none = cache.table.shape[0], jnp.int32(0)
    return Paused(pool(cache), draft, jnp.zeros(slots, jnp.int32), none, none,
                  jnp.argsort(waiting).astype(jnp.int32), none)


def _copy_blocks(target: Place, at: jax.Array, of: State | Paused, source: jax.Array) -> Place:
    draft = target.draft
    if draft is not None and draft.cache is not None:
        draft = draft.replace(cache=copy_block(draft.cache, at, of.draft.cache, source))
    return target.replace(cache=copy_block(target.cache, at, of.cache, source), draft=draft)


def _copy_row(target: Place, at: jax.Array, of: State | Paused, source: jax.Array) -> Place:
    """What a drafter keeps beside its blocks."""
    if target.draft is None:
        return target
    rows = jax.tree.map(lambda x, other: copy_entry(x, at, other, source), target.draft.rows,
                        of.draft.rows)
    return target.replace(draft=target.draft.replace(rows=rows))


def _filled(state: State, sequence: jax.Array) -> jax.Array:
    """How many blocks hold what is committed of a sequence; what comes after it is garbage."""
    return blocks_of(state.sequences.lengths[sequence], state.cache.size)


def pause(state: State, k: int) -> State:
    """Pause the youngest rows until the others have blocks for a cycle of up to k drafts. Mostly
    there are enough."""
    if state.paused is None:
        return state
    live, lengths = state.live, jnp.take(state.sequences.lengths, state.slots, mode="clip")
    needed = blocks_of(lengths + k + 1, state.cache.size) - shared_blocks(state, state.slots)
    turns = jnp.take(state.paused.turns, state.slots, mode="clip")
    oldest_first = jnp.argsort(jnp.where(live, turns, len(state.waiting)))
    fits = (jnp.cumsum(jnp.where(live, needed, 0)[oldest_first])
            <= state.free.count + own_blocks(state).sum())
    rows, going_on = live.sum(dtype=jnp.int32), (fits & live[oldest_first]).sum(dtype=jnp.int32)

    def step(i: jax.Array, state: State) -> State:
        slot = oldest_first[rows - 1 - i]
        sequence, line, paused = state.slots[slot], state.cache.table[slot], state.paused
        shared, filled = shared_blocks(state, sequence), _filled(state, sequence)
        paused = jax.lax.fori_loop(
            0, filled - shared,
            lambda j, to: _copy_blocks(to, to.blocks + j, state, line[shared + j]), paused)
        paused = _copy_row(paused, paused.count, state, slot)
        paused = paused.replace(sequences=paused.sequences.at[paused.count].set(sequence),
                                count=paused.count + 1,
                                blocks=paused.blocks + filled - shared, pauses=paused.pauses + 1)
        free = give_back(state.free, line, shared, own_blocks(state)[slot])
        state = with_table(state, state.cache.table.at[slot].set(state.cache.blocks))
        return state.replace(free=free, slots=state.slots.at[slot].set(len(state.waiting)),
                             paused=paused)

    with jax.named_scope("pause"):
        return jax.lax.fori_loop(0, rows - going_on, step, state)


def resume(state: State, k: int) -> State:
    """Give the paused rows, the oldest first, their blocks back as far as there is room for some
    cycles of all."""
    if state.paused is None:
        return state
    of = state.paused
    rank = of.count - 1 - jnp.arange(len(state.slots), dtype=jnp.int32)
    count = fitting(state, jnp.take(of.sequences, rank, mode="clip"), rank >= 0, k)
    free_first = jnp.argsort(state.live, stable=True)

    def step(i: jax.Array, state: State) -> State:
        paused, cache, slot = state.paused, state.cache, free_first[i]
        top = paused.count - 1
        sequence = paused.sequences[top]
        shared, filled = shared_blocks(state, sequence), _filled(state, sequence)
        column = jnp.arange(cache.table.shape[1])
        own = ((column >= shared)
               & (column < blocks_of(state.sequences.lengths[sequence] + k + 1, cache.size)))
        ids, free = take(state.free, own)
        theirs = state.prompts.table[state.sequences.prompts[sequence]]
        theirs = jnp.pad(theirs, (0, len(column) - len(theirs)))
        line = jnp.where(column < shared, theirs, jnp.where(own, ids, cache.blocks))
        first = paused.blocks - (filled - shared)
        state = with_table(state, cache.table.at[slot].set(line))
        state = jax.lax.fori_loop(shared, filled,
                                  lambda j, to: _copy_blocks(to, line[j], paused,
                                                             first + j - shared), state)
        state = _copy_row(state, slot, paused, top)
        return state.replace(free=free, slots=state.slots.at[slot].set(sequence),
                             paused=paused.replace(count=top, blocks=first))

    with jax.named_scope("resume"):
        return jax.lax.fori_loop(0, count, step, state)
