"""Keys and values in blocks of a pool: what is allocated, shared, copied and freed is a block,
never a row's cache.

A row's line of a block table says where its positions lie. Rows shrink, move, refill and share by
their lines alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

BLOCK = 128
"""Positions of a block: a line of a TPU's vector memory, and few enough that a row wastes little of
its last one."""
# positions of a tile of a TPU's memory: where one block is enough for a row it is a few of them
_TILE = 16

Count = TypeVar("Count", int, jax.Array)

KeyValues = Sequence[tuple[jax.Array, jax.Array]]
"""Keys and values of whole prompts, one pair a layer, [P, L, kv_heads, head_dim]."""


def block_size(positions: int) -> int:
    """How many positions a block has where no row has more than `positions`."""
    return min(BLOCK, -(-positions // _TILE) * _TILE)


def blocks_of(positions: Count, size: int) -> Count:
    """How many blocks of `size` that many positions take; int32 [...] of int32 [...]."""
    return -(-positions // size)


@struct.dataclass
class Cache:
    """Keys and values of B rows.

    Attributes:
      k, v: one array a layer, [blocks, kv_heads, size, head_dim] in the compute dtype. What lies
        beyond a row's length in its blocks is garbage that the next write at that position
        replaces.
      table: int32 [B, M], see `pallas_kernels.verify_attention`: a row's blocks in order; `blocks`
        where it has none.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    table: jax.Array

    @property
    def blocks(self) -> int:
        return self.k[0].shape[0]

    @property
    def size(self) -> int:
        """Positions of a block."""
        return self.k[0].shape[2]

    @property
    def capacity(self) -> int:
        """Positions that a row's line has room for."""
        return self.table.shape[1] * self.size


def write_prompts(prompts: KeyValues, table: jax.Array, blocks: int, size: int) -> Cache:
    """A pool of that many blocks of `size`, zeros but for the prompts: prompt p's positions lie in
    the blocks of its line of the table, int32 [P, M]; those of entries that are no block are left
    out."""
    def write(x: jax.Array) -> jax.Array:
        p, length, heads, d = x.shape
        x = jnp.pad(x, ((0, 0), (0, table.shape[1] * size - length), (0, 0), (0, 0)))
        x = x.reshape(p, table.shape[1], size, heads, d).swapaxes(2, 3)
        return jnp.zeros((blocks, heads, size, d), x.dtype).at[table].set(x, mode="drop")

    return Cache(tuple(write(k) for k, _ in prompts), tuple(write(v) for _, v in prompts), table)


def cache_of(prompts: KeyValues, positions: int) -> Cache:
    """The cache of rows that are whole prompts, each with blocks of its own for `positions`."""
    size = block_size(positions)
    rows, columns = prompts[0][0].shape[0], blocks_of(positions, size)
    return write_prompts(prompts, jnp.arange(rows * columns, dtype=jnp.int32)
                         .reshape(rows, columns), rows * columns, size)


def append(cache: Cache, layers: KeyValues, lengths: jax.Array) -> Cache:
    """The cache with T new positions a row, lengths .. lengths + T - 1, where the rows have blocks
    for them: keys and values of every layer [B, T, kv_heads, head_dim]; lengths int32 [B]."""
    new = lengths[:, None] + jnp.arange(layers[0][0].shape[1])
    live = cache.table[:, :1] < cache.blocks
    block = jnp.take_along_axis(cache.table, new // cache.size, axis=1, mode="clip")
    block, inside = jnp.where(live, block, cache.blocks), new % cache.size

    def write(pool: jax.Array, x: jax.Array) -> jax.Array:
        return pool.at[block, :, inside].set(x.astype(pool.dtype), mode="drop")

    return cache.replace(k=tuple(write(pool, k) for pool, (k, _) in zip(cache.k, layers,
                                                                        strict=True)),
                         v=tuple(write(pool, v) for pool, (_, v) in zip(cache.v, layers,
                                                                        strict=True)))


def rows_of(pool: jax.Array, table: jax.Array) -> np.ndarray:
    """What a pool [blocks, kv_heads, size, head_dim] holds of the rows of a table,
    [B, kv_heads, M * size, head_dim]; for looking at."""
    held = np.asarray(pool)[np.minimum(np.asarray(table), len(pool) - 1)].swapaxes(1, 2)
    return held.reshape(*held.shape[:2], -1, held.shape[-1])


def copy_entry(array: jax.Array, target: jax.Array, of: jax.Array, source: jax.Array) -> jax.Array:
    """The array with its entry `target` replaced by entry `source` of another, which may lie in
    another memory, or of itself; int32 scalars. Nothing but the entry is moved."""
    entry, space = jax.lax.dynamic_slice_in_dim(of, source, 1), jax.typeof(array).memory_space
    if jax.typeof(of).memory_space != space:
        entry = jax.device_put(entry, space)
    return jax.lax.dynamic_update_slice_in_dim(array, entry, target, axis=0)


def copy_block(cache: Cache, target: jax.Array, of: Cache, source: jax.Array) -> Cache:
    """The cache with its block `target` replaced by block `source` of another or of itself, in
    every layer; int32 scalars."""
    def copy(pools: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(copy_entry(pool, target, other, source)
                     for pool, other in zip(pools, others, strict=True))

    return cache.replace(k=copy(cache.k, of.k), v=copy(cache.v, of.v))


@struct.dataclass
class FreeBlocks:
    """A stack of the blocks that no row has.

    Attributes:
      ids: int32 [blocks + M]; the first `count` are free, the rest is garbage (room for a whole
        line to be pushed).
      count: int32 scalar. fewest: int32 scalar, the smallest count so far.
    """

    ids: jax.Array
    count: jax.Array
    fewest: jax.Array


def all_free(first: jax.Array, blocks: int, columns: int) -> FreeBlocks:
    """Blocks first (int32 scalar) .. blocks - 1, of which the lowest is taken first; lines have at
    most `columns` entries."""
    count = jnp.asarray(blocks - first, jnp.int32)
    return FreeBlocks(blocks - 1 - jnp.arange(blocks + columns, dtype=jnp.int32), count, count)


def take(free: FreeBlocks, wanted: jax.Array) -> tuple[jax.Array, FreeBlocks]:
    """A block for each true of wanted, bool [...]: int32 [...], garbage where it is false. There
    must be as many."""
    order = jnp.cumsum(wanted.ravel()).reshape(wanted.shape)
    ids = free.ids[jnp.maximum(free.count - order, 0)]
    count = free.count - wanted.sum(dtype=jnp.int32)
    return ids, free.replace(count=count, fewest=jnp.minimum(free.fewest, count))


def give_back(free: FreeBlocks, line: jax.Array, first: jax.Array, count: jax.Array) -> FreeBlocks:
    """Push entries first .. first + count - 1 of a line of a table, int32 [M]."""
    ids = jax.lax.dynamic_update_slice_in_dim(free.ids, jnp.roll(line, -first), free.count, axis=0)
    return free.replace(ids=ids, count=free.count + count)
