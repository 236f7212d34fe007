"""What a warpgroup computes of a tile on Hopper: a step's keys or values cut into bfloat16 parts,
products of parts, and one step of online softmax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.verify_attention.reach import seen

STEP = 64  # positions
ROWS = 64  # of a matrix instruction
COLUMNS = 64  # of a line of shared memory as matrix instructions want it, bfloat16
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static."""

    group: int
    new: int
    window: int | None
    together: str | None
    kv_heads: int
    blocks: int  # of the pool
    size: int  # positions of a block
    split: int  # positions
    splits: int  # that a row may have
    programs: int
    warpgroups: int
    tiles: int  # of ROWS query rows, one to a warpgroup
    rows: int  # of a tile that exist, a multiple of 8
    head_dim: int
    dtype: Any
    interpret: bool

    @property
    def parts(self) -> int:
        """bfloat16 numbers that a number is cut into."""
        return 3 if self.dtype == jnp.float32 else 1

    @property
    def slots(self) -> int:
        """Steps of keys or of values in the ring."""
        return 4 * self.warpgroups if self.parts == 1 else 3

    @property
    def run(self) -> int:
        """Positions of a step that lie in one block, whatever the step."""
        return math.gcd(self.size, STEP)

    @property
    def chunks(self) -> list[Any]:
        """Of a head's columns."""
        return [pl.ds(c, COLUMNS) for c in range(0, self.head_dim, COLUMNS)]

    def cast(self, x: jax.Array, layout: Any) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return self.cast(jnp.full(shape, value, jnp.float32), layout)

    def iota(self, shape: tuple[int, ...], dimension: int) -> jax.Array:
        return self.cast(lax.broadcasted_iota(jnp.int32, shape, dimension), plgpu.Layout.WGMMA)


def parts_of(x: jax.Array) -> Iterator[jax.Array]:
    """bfloat16 numbers whose sum is x, the largest first. Cut off, not rounded: no compiler takes
    that for nothing."""
    if x.dtype == jnp.bfloat16:
        yield x
        return
    for _ in range(3):
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32)
                                        & jnp.uint32(0xFFFF0000), jnp.float32)
        yield high.astype(jnp.bfloat16)
        x -= high


def wait_for_all(barrier, plan) -> None:
    if plan.warpgroups > 1:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


def cut(held, tiles, count, plan) -> list[Any]:
    """What matrix instructions take of a step's keys or values [STEP, D]: float32 is cut into tiles
    [3, STEP, D], of which the rows from `count` on are zeros.
    """
    if plan.parts == 1:
        return [held]
    for chunk in plan.chunks:
        x = plan.cast(held[:, chunk], plgpu.Layout.WGMMA)
        for i, high in enumerate(parts_of(jnp.where(plan.iota(x.shape, 0) < count, x, 0.0))):
            tiles[i, :, chunk] = high
    plgpu.commit_smem()
    return [tiles.at[i] for i in range(plan.parts)]


def product(a, b, plan, *, transposed=False) -> jax.Array:
    """float32 a @ b, or a @ b.T, of lists of parts; a: references or registers."""
    pairs = [(x, y) for i, x in enumerate(a) for y in b[:len(b) - i]]
    # knows no transposed references; plain loads want a fence before TMA writes where they read
    if plan.interpret:
        dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
        out = sum(lax.dot_general(x[...], y[...], dimensions, preferred_element_type=jnp.float32)
                  for x, y in pairs)
        plgpu.commit_smem()
        return out

    def run(acc) -> jax.Array:
        for x, y in pairs:
            plgpu.wgmma(acc, x, plgpu.transpose_ref(y, (1, 0)) if transposed else y)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, b[0].shape[0] if transposed else b[0].shape[1]),
                                        jnp.float32))


def softmax_step(scores, top, total, tile, start, length, end,
                 plan) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    """One step of online softmax (https://arxiv.org/abs/1805.02867), in powers of two."""
    position = start + plan.iota(scores.shape, 1)
    offset = lax.div(plan.iota(scores.shape, 0) + tile * plan.rows, plan.group)
    visible = (position < end) & seen(position, length, offset, plan.new, plan.window,
                                      plan.together)
    scores = jnp.where(visible, scores * (LOG2E * plan.head_dim ** -0.5), -jnp.inf)
    highest = jnp.maximum(top, scores.max(1))
    weights = jnp.exp2(scores - lax.broadcast_in_dim(highest, scores.shape, (0,)))
    scale = jnp.exp2(top - highest)
    return (highest, total * scale + weights.sum(1), scale,
            list(parts_of(weights.astype(plan.dtype))))


def clear_rows(values, count, warpgroup, meet, plan) -> None:
    """Zero the rows of bfloat16 values [STEP, D] from `count` on, before any warpgroup reads
    them."""
    @pl.when(warpgroup == 0)
    def _() -> None:
        for chunk in plan.chunks:
            x = plan.cast(values[:, chunk].astype(jnp.float32), plgpu.Layout.WGMMA)
            values[:, chunk] = jnp.where(plan.iota(x.shape, 0) < count, x, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()

    wait_for_all(meet, plan)
