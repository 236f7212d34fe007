"""Micro-batches of rows of like length, so that the update pays for tokens and not for padding.

Rows are ordered by length, longest first, and a short chain of loops goes over them. Each loop is
compiled for one width, to which it trims the responses, and for a number of rows, and leaves off
where the longest row that is left fits the next one's. All of it is one program: how many
micro-batches each loop takes is data, and other lengths compile nothing anew.

`optax.microbatching` and `optax.MultiSteps` take parts of one shape; here the widths are what saves
the time.

On a mesh each shard orders its own rows, so that a row stays where its prompt is; a loop goes on
while any shard has a row for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.kernels import platform
from jspec.rl.batch import TrainBatch
from jspec.sharding import batch_shards, block_rows, constrain

# widths: how many, one over the next, and the least that is worth compiling
MOST, RATIO, SHORTEST = 6, 1.5, 64


BY_TOKEN = ("behaviour_logprobs", "own_logprobs")
"""Fields of a batch that it may lack, one number for every token."""


@struct.dataclass
class MicroBatch:
    """Some rows of a batch, trimmed to a width.

    Attributes:
      rows: groups of one; a row that fills the micro-batch up has nothing in its mask. Its prompts
        have been computed, and no routes.
      prompts: int32 [blocks, rows // blocks], which of the batch's prompts each row continues,
        within its block (`sharding.block_rows`).
      index: int32 likewise, which of the batch's rows each is; what fills the micro-batch up has
        the place of a row that is in it or another one.
      of_block: static, rows of a block of the batch.
    """

    rows: TrainBatch
    prompts: jax.Array
    index: jax.Array
    of_block: int = struct.field(pytree_node=False)

    def back(self, x: jax.Array, length: int) -> jax.Array:
        """Values float [rows, T] of the rows' tokens, 0 outside of their masks, at their places in
        the batch, float [N, length]; 0 at those of all other rows."""
        blocks, rows = self.index.shape
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]))).reshape(blocks, rows, length)
        empty = jnp.zeros((blocks, self.of_block, length), x.dtype)
        return jax.vmap(lambda empty, index, x: empty.at[index].add(x))(
            empty, self.index, x).reshape(-1, length)


def blocks_of(batch: TrainBatch) -> int:
    """Into how many blocks of rows a batch is cut, each of which is ordered by itself: the mesh's
    shards where they divide the prompts; else one, for then prompts are not split as rows are."""
    shards = batch_shards("train")
    return shards if batch.prompts.shape[0] % shards == 0 else 1


def usual_widths(longest: int) -> tuple[int, ...]:
    """`longest`, and what comes of dividing it by RATIO again and again: whole tiles, not below
    SHORTEST."""
    tile = 16 if longest < 2048 else 128
    shorter = (round(longest / RATIO**i / tile) * tile for i in range(1, MOST))
    return longest, *(width for width in shorter if width >= SHORTEST)


def least_tokens() -> int:
    """Tokens of a micro-batch on a device, below which it would wait for its weights' bytes: fewer
    tokens cost as much, and more of them mean rows of less like length."""
    return 512 if platform() == "cpu" else 4096


def shapes(batch: TrainBatch, micro_batch: int,
           widths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(rows of a block, width) of the micro-batches that a batch is cut into, the widest first.

    micro_batch: rows of all blocks; 0: as many as make `least_tokens`. Of narrower ones more, up to
    the same number of tokens, where a device had fewer than `least_tokens`. widths: what responses
    are trimmed to besides their full width; none named: `usual_widths`.
    """
    (n, full), shards, blocks = batch.tokens.shape, batch_shards("train"), blocks_of(batch)
    asked = micro_batch // shards  # of a device
    names = (sorted({full, *(width for width in widths if width < full)}, reverse=True) if widths
             else usual_widths(full))

    def rows(width: int) -> int:
        fewest = min(least_tokens(), asked * full) if asked else least_tokens()
        each = max(1, asked, fewest // width)
        # that many take all rows: alike, so that the last is as full as the others
        times = -(-n // (shards * each))
        return -(-n // (shards * times)) * shards // blocks

    return tuple((rows(width), width) for width in names)


def accumulate(one: Callable[[MicroBatch], tuple[Any, Any]], batch: TrainBatch,
               shapes: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
    """`one` gives (sums, maxima >= 0) of a micro-batch: those of all rows that have a trained
    token, in micro-batches of `shapes`."""
    order, longest = by_length(batch)
    longest = jnp.pad(longest, (0, max(rows for rows, _ in shapes)))  # 0: no row is left

    def micro_batch(done: jax.Array, rows: int, width: int) -> MicroBatch:
        return take(batch, order, done, rows, width)

    narrowest = shapes[-1]
    of_one = jax.eval_shape(lambda done: one(micro_batch(done, *narrowest)),
                            jax.ShapeDtypeStruct((), jnp.int32))
    carry = (jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), of_one))
    for (rows, width), shorter in zip(shapes, (*(width for _, width in shapes[1:]), 0),
                                      strict=True):
        def body(carry, rows=rows, width=width) -> tuple[Any, Any]:
            done, (sums, maxima) = carry
            more, others = one(micro_batch(done, rows, width))
            return (done + rows,
                    (jax.tree.map(jnp.add, sums, more), jax.tree.map(jnp.maximum, maxima, others)))

        carry = jax.lax.while_loop(lambda carry, shorter=shorter: longest[carry[0]] > shorter, body,
                                   carry)
    return carry[1]


def by_length(batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
    """(order int32 [blocks, n], of every block's rows, the longest first; int32 [n], how long the
    longest of the i-th rows of all blocks is). A row is as long as up to its last trained token:
    what comes after changes nothing."""
    ends = jnp.max(jnp.where(batch.mask, 1 + jnp.arange(batch.mask.shape[1], dtype=jnp.int32), 0),
                   axis=1)
    ends = ends.reshape(blocks_of(batch), -1)
    order = jnp.argsort(-ends, axis=1, stable=True).astype(jnp.int32)
    return order, jnp.take_along_axis(ends, order, axis=1).max(axis=0)


def take(batch: TrainBatch, order: jax.Array, done: jax.Array, rows: int, width: int) -> MicroBatch:
    """The next `rows` rows of every block after `done` of them, in `order`, trimmed to `width`."""
    place = done + jnp.arange(rows, dtype=jnp.int32)
    index = order[:, jnp.minimum(place, order.shape[1] - 1)]
    prompts = index // batch.group_size

    def by_row(x) -> jax.Array:
        return constrain(block_rows(x, index), "train", "batch", *(None,) * (x.ndim - 1))

    def by_prompt(x) -> jax.Array:
        return constrain(block_rows(x, prompts), "train", "batch", *(None,) * (x.ndim - 1))

    live = jnp.broadcast_to(place < order.shape[1], index.shape).reshape(-1, 1)
    trunk = jax.tree.map(lambda x: by_row(x[:, :batch.prompts.shape[1] + width]), batch.trunk)
    advantages = batch.advantages
    if advantages is not None:
        advantages = by_row(advantages[:, :width] if advantages.ndim == 2 else advantages)
    rows = TrainBatch(by_prompt(batch.prompts), by_prompt(batch.prompt_lengths),
                      by_row(batch.tokens[:, :width]),
                      by_row(batch.logprobs[:, :width]), by_row(batch.mask[:, :width]) & live,
                      advantages, trunk,
                      None if batch.routes is None else by_row(batch.routes[:, :width]),
                      shares=None if batch.shares is None else by_row(batch.shares),
                      **{name: by_row(x[:, :width]) for name in BY_TOKEN
                         if (x := getattr(batch, name)) is not None})
    return MicroBatch(rows, prompts, index, order.shape[1])
