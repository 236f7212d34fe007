"""What one pass over the logits leaves of each row; the verdict follows from it (`verdict.py`).

The pass is the kernels' (`tpu.summarize`, `gpu.summarize`); it is all that reads the whole of the
logits. A chunk is CHUNK neighbouring columns, which one program can summarise without knowing the
rest of its row, so the grid is split as the chip likes; putting the chunks together is arithmetic
on a few numbers a chunk. Where the vocabulary is sharded every shard does this with its part, and a
few numbers a row cross the mesh (`axis`), never logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.rejection_sampling.reference import VOCAB_BLOCK

CHUNK = VOCAB_BLOCK

Axis = tuple[str, ...] | None
"""The mesh axes that share the vocabulary, in order; None: it is whole."""


@struct.dataclass
class Summary:
    """Of R rows of logits [R, V] in C = ceil(V / CHUNK) chunks. All arrays are [R, C].

    With x the logits in float32, T = 0 counting as 1, and id = column + offset the global
    vocabulary id. Only differences are divided by T: see `processing.scaled`.

    Attributes:
      top: float32, the largest x; -inf if all are.
      total: float32, sum of exp((x - top) / T); 0 where top is -inf.
      weighted: float32, sum of exp((x - top) / T) * (x - top) / T, a term of x = -inf counting 0.
      best: float32, x of the largest score over the chunk's ids that are not banned: x / T, plus
        the Gumbel noise of (key, id) where keys are given and T > 0. -inf if there is none.
      best_id: int32, its global id; ties go to the lowest. Anything where best is -inf.
      best_noise: float32, the noise in that score, 0 where T = 0 or best is -inf; None where no
        keys are given.
      drafted: float32, x of the row's drafted token where the chunk has it, else -inf; None where
        keys are given.
      mass: float32, sum of exp((x - best) / T) over the ids below the first multiple of CHUNK that
        is greater than the chunk's first id, without the row's drafted token and banned ids; None
        where keys are given. (Against `top`, what is left beside a banned id of large x would be
        0.)
      spill: float32, the same over the chunk's other ids (none, if offset is a multiple of CHUNK);
        None where keys are given, and where the whole vocabulary is here (offset None).
    """

    top: jax.Array
    total: jax.Array
    weighted: jax.Array
    best: jax.Array
    best_id: jax.Array
    best_noise: jax.Array | None = None
    drafted: jax.Array | None = None
    mass: jax.Array | None = None
    spill: jax.Array | None = None


@struct.dataclass
class Rows:
    """Of whole rows, float32 [R]: the largest logit, the logarithm of sum(exp((x - top) / T)), and
    the policy's entropy."""

    top: jax.Array
    log_total: jax.Array
    entropy: jax.Array


def psum(x: jax.Array, axis: Axis) -> jax.Array:
    return x if axis is None else jax.lax.psum(x, axis)


def pmax(x: jax.Array, axis: Axis) -> jax.Array:
    return x if axis is None else jax.lax.pmax(x, axis)


def finite(x: jax.Array) -> jax.Array:
    """x, or 0 where it is -inf: what is measured from it is -inf itself, and -inf - -inf would be
    NaN."""
    return jnp.where(x > -jnp.inf, x, 0.0)


def rows_of(s: Summary, scale: jax.Array, axis: Axis) -> Rows:
    """scale: 1 / T, float32 [R]."""
    top = finite(pmax(s.top.max(-1), axis))
    shift = jnp.where(s.top > -jnp.inf, (s.top - top[:, None]) * scale[:, None], 0.0)
    share = jnp.exp(shift)
    total = psum((share * s.total).sum(-1), axis)
    # a chunk so far below that it counts nothing may have a product that overflows
    weighted = psum(jnp.where(share > 0, share * (s.weighted + s.total * shift), 0.0).sum(-1), axis)
    return Rows(top, jnp.log(total), jnp.log(total) - weighted / total)


def best_of(s: Summary, scale: jax.Array, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Id int32 [R] and logit float32 [R] of each row's largest score."""
    def pick(scores, *values) -> tuple[jax.Array, ...]:
        at = jnp.argmax(scores, 0)[None]
        return tuple(jnp.take_along_axis(x, at, axis=0)[0] for x in (scores, *values))

    scores = s.best
    if s.best_noise is not None:
        largest = finite(pmax(s.best.max(-1), axis))
        scores = (s.best - largest[:, None]) * scale[:, None] + s.best_noise
    best = pick(scores.T, s.best_id.T, s.best.T)
    if axis is not None:
        best = pick(*(jax.lax.all_gather(x, axis) for x in best))
    return best[1:]


def by_block(summary: jax.Array, spill: jax.Array | None) -> jax.Array:
    """What lies in each block of the vocabulary, [..., C + 1], from the chunks' two parts
    [..., C]."""
    if spill is None:
        return jnp.pad(summary, [(0, 0)] * (summary.ndim - 1) + [(0, 1)])
    last = [(0, 0)] * (summary.ndim - 1)
    return jnp.pad(summary, [*last, (0, 1)]) + jnp.pad(spill, [*last, (1, 0)])


def cut(x: jax.Array, row: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """x[row[b], start[b] : start[b] + width], [B, width] from [R, n]."""
    return jax.vmap(lambda r, at: jax.lax.dynamic_slice(x, (r, at), (1, width))[0])(row, start)


def entry(x: jax.Array, position: jax.Array) -> jax.Array:
    """x[b, position[b]] of every row, [B, ...] from [B, n, ...]."""
    index = position.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1)[:, 0]
