"""The decode loop's state in three parts, prompts, slots and sequences, and how a sequence moves
through them.

A sequence waits until a slot is free; `admit` gives it the slot, its prompt's full blocks and a
copy of the last, partial one; `grow` gives it blocks as it gets longer; `retire` takes slot and
blocks back; `compact` moves the rows that are left together; `end` leaves them where they are. All
that a rollout returns is written to the sequences, so no move can be seen in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.drafts.base import DraftState
from jspec.model import Cache, Trunk
from jspec.model.pool import FreeBlocks, blocks_of, copy_block, give_back, take


@struct.dataclass
class Prompts:
    """P prompts, computed once.

    Attributes:
      lengths: int32 [P]. table: int32 [P, C], the blocks that hold them.
      readers: int32 [P], sequences that may still read those blocks.
      draft: the drafter's state at each prompt's end, leaves leading with P; None without a draft.
    """

    lengths: jax.Array
    table: jax.Array
    readers: jax.Array
    draft: Any


@struct.dataclass
class Sequences:
    """N sequences, in a slot or not.

    Attributes:
      ids: int32 [N], of their noise. prompts: int32 [N], which prompt each continues.
      prompt_lengths, lengths: int32 [N]; lengths counts committed tokens, the prompt included.
      tokens: int32 [N, S], prompt and output; garbage from `lengths` on.
      logprobs, entropy: float32 [N, T + K], by generated token; garbage beyond what is committed.
      behaviour_logprobs: the same, or None where nothing is cut off (`Sampling.cuts`).
      done: bool [N], finished or at its limit. finished: bool [N], an end token was emitted.
      temperature: float32 [N]. top_p, min_p: float32 [N] or None. limit: int32 [N], of
        generated tokens.
      trunk: `Trunk` over [N, S] of the states to be returned, or None; garbage from `lengths` - 1
        on.
      cycles: int32 [N], see `RolloutStats`.
      routes: uint8 [N, T + K, sparse layers x top_k], by generated token, the experts of the token
        before it, which is the prompt's last of the first one; None of a dense policy. Flat, as a
        TPU pads what is short.
      group_size: static; each group_size adjacent sequences, from the first one on, continue one
        prompt.
    """

    ids: jax.Array
    prompts: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    entropy: jax.Array
    done: jax.Array
    finished: jax.Array
    temperature: jax.Array
    top_p: jax.Array | None
    limit: jax.Array
    trunk: Trunk | None
    cycles: jax.Array
    routes: jax.Array | None = None
    min_p: jax.Array | None = None
    behaviour_logprobs: jax.Array | None = None
    group_size: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Counts:
    """What happened, see `RolloutStats`: drafted, accepted int32 [K]; loop_cycles, loop_live int32
    [loops]."""

    drafted: jax.Array
    accepted: jax.Array
    loop_cycles: jax.Array
    loop_live: jax.Array


@struct.dataclass
class Paused:
    """Rows that are paused, always the youngest in flight: a stack, the oldest of them on top.

    Attributes:
      cache: blocks of the policy's cache, in host memory; each row's lie together, in their order.
        It has no table. draft: the drafter's, its rows of B on the device; None: no draft.
      sequences: int32 [B], the first `count`, int32 scalar, are paused. blocks: int32 scalar, how
        many are filled.
      turns: int32 [N], which place each sequence has among `State.waiting`: a row's age.
      pauses: int32 scalar, how often a row was paused so far.
    """

    cache: Cache
    draft: DraftState | None
    sequences: jax.Array
    count: jax.Array
    blocks: jax.Array
    turns: jax.Array
    pauses: jax.Array


@struct.dataclass
class State:
    """B slots and all that stands around them. The last committed token of a row is pending: its
    keys and values are not in the cache yet.

    Attributes:
      slots: int32 [B], the sequence of each; N where the slot is free.
      cache: the policy's, with the slots' lines of the block table. draft: the drafter's, of the
        slots; None: no draft.
      free: the blocks that are nobody's.
      waiting: int32 [N], the sequences in the order in which they get a slot; the first `admitted`,
        int32 scalar, have got theirs. wanted: int32 scalar, how many will ever want one.
      paused: rows that had to leave their slot; None: there are blocks for all, and no row ever has
        to.
    """

    prompts: Prompts
    sequences: Sequences
    slots: jax.Array
    cache: Cache
    draft: DraftState | None
    free: FreeBlocks
    waiting: jax.Array
    admitted: jax.Array
    wanted: jax.Array
    counts: Counts
    paused: Paused | None = None

    @property
    def live(self) -> jax.Array:
        """bool [B], which slots hold a sequence."""
        return self.slots < self.sequences.ids.shape[0]

    @property
    def in_flight(self) -> jax.Array:
        """How many sequences have a slot or are paused, int32 scalar."""
        live = self.live.sum(dtype=jnp.int32)
        return live if self.paused is None else live + self.paused.count

    @property
    def more(self) -> jax.Array:
        """Whether a sequence still waits for a slot, bool scalar."""
        return self.admitted < self.wanted


@struct.dataclass
class Rows:
    """What a cycle has to know of the sequence in each of the B slots, of `Sequences`; garbage
    where none is live."""

    live: jax.Array
    ids: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    temperature: jax.Array
    top_p: jax.Array | None
    min_p: jax.Array | None
    limit: jax.Array


def rows_in_slots(state: State) -> Rows:
    of = state.sequences
    fields = (of.ids, of.prompt_lengths, of.lengths, of.temperature, of.top_p, of.min_p,
              of.limit)
    return Rows(state.live,
                *jax.tree.map(lambda x: jnp.take(x, state.slots, axis=0, mode="clip"), fields))


def with_table(state: State, table: jax.Array) -> State:
    """The state with another block table, int32 [B, M], of the policy's cache and the drafter's."""
    draft = state.draft
    if draft is not None and draft.cache is not None:
        draft = draft.replace(cache=draft.cache.replace(table=table))
    return state.replace(cache=state.cache.replace(table=table), draft=draft)


def shared_blocks(state: State, sequences: jax.Array) -> jax.Array:
    """How many blocks at the front of their line sequences int32 [...] share with the others of
    their prompt: those that it fills, but for one with its last token, which is pending and will be
    written again."""
    return ((jnp.take(state.sequences.prompt_lengths, sequences,
                      mode="clip") - 1) // state.cache.size)


def own_blocks(state: State) -> jax.Array:
    """How many blocks beside the shared ones each row has, int32 [B]."""
    held = (state.cache.table < state.cache.blocks).sum(1, dtype=jnp.int32)
    return jnp.where(state.live, held - shared_blocks(state, state.slots), 0)


def fitting(state: State, sequences: jax.Array, asking: jax.Array, k: int) -> jax.Array:
    """How many of sequences int32 [B], one after the other, can have a slot, int32 scalar; asking:
    bool [B], true at the front. For each of them, and each row that has one already, there must be
    blocks for a cycle of up to k drafts and one block more, unless it will never need it: so no row
    soon has to leave its slot again."""
    def foreseen(sequences: jax.Array) -> jax.Array:
        of, size = state.sequences, state.cache.size
        lengths, prompts, limit = (jnp.take(x, sequences, mode="clip")
                                   for x in (of.lengths, of.prompt_lengths, of.limit))
        needed = jnp.minimum(blocks_of(lengths + k + 1, size) + 1,
                             blocks_of(prompts + limit + k, size))
        return needed - shared_blocks(state, sequences)

    kept = jnp.where(state.live, foreseen(state.slots) - own_blocks(state), 0).sum(dtype=jnp.int32)
    fits = jnp.cumsum(foreseen(sequences), dtype=jnp.int32) <= state.free.count - kept
    return jnp.minimum((fits & asking).sum(dtype=jnp.int32), (~state.live).sum(dtype=jnp.int32))


def _for_each(slots: jax.Array, most: jax.Array | int, step: Callable[[State, jax.Array], State],
              state: State) -> State:
    """step(state, slot) for each slot that is true in bool [B], in order, `most` of them at most.
    What it costs follows how many there are: mostly none."""
    order = jnp.argsort(~slots, stable=True)
    count = jnp.minimum(slots.sum(dtype=jnp.int32), most)
    return jax.lax.fori_loop(0, count, lambda i, state: step(state, order[i]), state)


def admit(state: State, k: int) -> State:
    """Give every free slot the next sequence that waits, as far as there are blocks; none while
    rows are paused. k: the most that a cycle drafts."""
    def step(state: State, slot: jax.Array) -> State:
        cache, prompts = state.cache, state.prompts
        size, columns = cache.size, cache.table.shape[1]
        sequence = state.waiting[state.admitted]
        prompt = state.sequences.prompts[sequence]
        length, theirs = prompts.lengths[prompt], prompts.table[prompt]
        # the pending token is written again: what holds it must be the row's own, even where the
        # prompt fills it
        shared = (length - 1) // size
        own = jnp.arange(2) < blocks_of(length + k + 1, size) - shared
        ids, free = take(state.free, own)
        line = jnp.pad(theirs, (0, columns - len(theirs)))
        line = jnp.where(jnp.arange(columns) < shared, line, cache.blocks)
        line = line.at[shared + jnp.arange(2)].set(jnp.where(own, ids, cache.blocks), mode="drop")
        state = with_table(state, cache.table.at[slot].set(line))
        draft, source = state.draft, theirs[shared]
        if draft is not None:
            rows = jax.tree.map(lambda all, of: all.at[slot].set(of[prompt]), draft.rows,
                                prompts.draft)
            cache = (None if draft.cache is None
                     else copy_block(draft.cache, ids[0], draft.cache, source))
            draft = DraftState(rows, cache)
        return state.replace(cache=copy_block(state.cache, ids[0], state.cache, source),
                             draft=draft, free=free,
                             slots=state.slots.at[slot].set(sequence), admitted=state.admitted + 1)

    with jax.named_scope("admit"):
        waiting = state.wanted - state.admitted
        if state.paused is not None:
            next_ones = jnp.arange(len(state.slots), dtype=jnp.int32)
            waiting = fitting(state,
                              jnp.take(state.waiting, state.admitted + next_ones, mode="clip"),
                              (next_ones < waiting) & (state.paused.count == 0), k)
        return _for_each(~state.live, waiting, step, state)


def grow(state: State, k: int) -> State:
    """Give every live row the blocks that a cycle of up to k drafts may write to: at most two, as
    it is one cycle longer than when it was last asked."""
    table, blocks = state.cache.table, state.cache.blocks
    lengths = jnp.take(state.sequences.lengths, state.slots, mode="clip")
    held = (table < blocks).sum(1, dtype=jnp.int32)
    missing = jnp.where(state.live, blocks_of(lengths + k + 1, state.cache.size) - held, 0)
    wanted = jnp.arange(2) < missing[:, None]
    ids, free = take(state.free, wanted)
    columns = jnp.where(wanted, held[:, None] + jnp.arange(2), table.shape[1])
    table = table.at[jnp.arange(len(held))[:, None], columns].set(ids, mode="drop")
    return with_table(state, table).replace(free=free)


def retire(state: State) -> State:
    """Free the slots whose sequence is done, and their blocks; a prompt's with the last of its
    sequences."""
    def step(state: State, slot: jax.Array) -> State:
        blocks, table, prompts = state.cache.blocks, state.cache.table, state.prompts
        prompt, line = state.sequences.prompts[state.slots[slot]], table[slot]
        shared = (prompts.lengths[prompt] - 1) // state.cache.size
        free = give_back(state.free, line, shared, (line < blocks).sum(dtype=jnp.int32) - shared)
        readers = prompts.readers.at[prompt].add(-1)
        theirs = prompts.table[prompt]
        held = jnp.where(readers[prompt] == 0, (theirs < blocks).sum(dtype=jnp.int32), 0)
        state = with_table(state, table.at[slot].set(blocks))
        return state.replace(free=give_back(free, theirs, jnp.int32(0), held),
                             slots=state.slots.at[slot].set(len(state.waiting)),
                             prompts=prompts.replace(readers=readers))

    with jax.named_scope("retire"):
        over = state.live & jnp.take(state.sequences.done, state.slots, mode="clip")
        return _for_each(over, len(over), step, state)


def end(state: State, groups: int) -> State:
    """The state with nothing more to do, once all sequences of so many groups are done: no sequence
    has a slot, is paused or waits any more. Its blocks belong to nobody, and are not wanted
    either."""
    of, paused = state.sequences, state.paused
    with jax.named_scope("retire"):
        over = of.done.reshape(-1, of.group_size).all(1).sum(dtype=jnp.int32) >= groups
        if paused is not None:
            paused = paused.replace(count=jnp.where(over, 0, paused.count))
        state = with_table(state, jnp.where(over, state.cache.blocks, state.cache.table))
        return state.replace(slots=jnp.where(over, len(state.waiting), state.slots), paused=paused,
                             wanted=jnp.where(over, state.admitted, state.wanted))


def compact(state: State, rows: int) -> State:
    """The state with that many slots: the live rows, of which there must not be more, in the order
    they are in."""
    order = jnp.argsort(~state.live, stable=True)[:rows]
    draft = state.draft
    if draft is not None:
        draft = draft.replace(rows=jax.tree.map(lambda x: x[order], draft.rows))
    state = with_table(state.replace(draft=draft), state.cache.table[order])
    return state.replace(slots=state.slots[order])
