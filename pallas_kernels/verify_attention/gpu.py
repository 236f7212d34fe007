"""Attention of a few new positions against a ragged cache on a GPU: Mosaic GPU, Hopper and later.

A program takes SPLIT cached positions of one KV head of one row; programs beyond the row's length end at once. TMA
brings blocks of keys and values to shared memory, two blocks ahead: 64 KB on their way in each of the two programs that
a multiprocessor holds, where about 40 KB saturate an H200. The new positions are one more block of the row's last
program, which also writes them into the cache once all that it reads has arrived: nothing that is read is written.

A split's sums, unnormalised, take T x group rows of float32, 6% of what was read, and are put together by XLA.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK, STAGES = 64, 2  # positions of a block; blocks in shared memory
SPLIT = 512
ROWS = 64  # of a matrix instruction
COLUMNS = 64  # of a line of shared memory as matrix instructions want it, bfloat16
NEW = 16  # new positions are padded to what a matrix instruction contracts at once
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static."""

    group: int
    new: int
    window: int | None
    kv_heads: int
    splits: int
    tiles: int  # of ROWS query rows
    rows: int  # of a tile that exist, a multiple of 8
    head_dim: int
    interpret: bool

    def cast(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def full(self, shape, value):
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return self.cast(jnp.full(shape, value, jnp.float32), layout)

    def iota(self, shape, dimension):
        return self.cast(lax.broadcasted_iota(jnp.int32, shape, dimension), plgpu.Layout.WGMMA)


@partial(jax.jit, static_argnames=("window", "interpret"))  # references to GPU memory want a jit around them
def verify_attention(q: jax.Array, k: jax.Array, v: jax.Array, cache_k: jax.Array, cache_v: jax.Array,
                     lengths: jax.Array, *, window: int | None = None, interpret: Any = False):
    """See `api.verify_attention`. interpret: False, or an InterpretGPUParams.

    Raises NotImplementedError for a cache that is not bfloat16, head sizes other than 64 and 128, and more than NEW new
    positions.
    """
    b, new, _, d = q.shape
    kv_heads, size = cache_k.shape[1:3]
    if d not in (64, 128):
        raise NotImplementedError(f"heads must be of size 64 or 128, not {d}")
    if new > NEW:
        raise NotImplementedError(f"{new} new positions a row are more than {NEW}")
    if q.dtype != jnp.bfloat16 or cache_k.dtype != q.dtype:
        raise NotImplementedError(f"queries and cache must be bfloat16, not {q.dtype} and {cache_k.dtype}")
    group = q.shape[2] // kv_heads
    packed = q.reshape(b, new, kv_heads, group, d).swapaxes(1, 2).reshape(b, kv_heads, -1, d)
    tiles = pl.cdiv(new * group, ROWS)
    packed = _pad(packed, ROWS if tiles > 1 else 8)
    rows = packed.shape[2] // tiles
    plan = _Plan(group, new, window, kv_heads, pl.cdiv(size, SPLIT), tiles, rows, d, bool(interpret))
    caches = [jax.new_ref(x, memory_space=plgpu.GMEM) for x in (cache_k, cache_v)]
    shape = b, kv_heads, plan.splits, packed.shape[2]
    sums, stats = pl.kernel(
        partial(_scoped, plan=plan),
        out_type=[jax.ShapeDtypeStruct((*shape, d), jnp.float32),
                  jax.ShapeDtypeStruct((*shape[:3], tiles, 2, ROWS), jnp.float32)],
        mesh=plgpu.Mesh(grid=(b * kv_heads * plan.splits * tiles,), grid_names=("program",)),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        name="verify_attention",
    )(packed, _pad(k.swapaxes(1, 2), NEW), _pad(v.swapaxes(1, 2), NEW), lengths, *caches)
    out = _combine(sums, stats, lengths, plan)[:, :, :new * group].astype(q.dtype)
    return (out.reshape(b, kv_heads, new, group, d).swapaxes(1, 2).reshape(q.shape), *map(jax.freeze, caches))


def _pad(x, multiple):
    """Rows of x [B, H_kv, rows, D], zeros up to a multiple."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, 0)))


def _live(split, length, window):
    """Whether a split of a row has anything to do, and whether it is the row's last."""
    last = split == lax.div(jnp.maximum(length - 1, 0), SPLIT)
    live = last | (split * SPLIT < length)
    if window is not None:
        live &= last | ((split + 1) * SPLIT > length - window + 1)
    return live, last


def _combine(sums, stats, lengths, plan):
    """Sums of the splits [B, H_kv, splits, rows, D] to the output, one after the other: XLA chooses no order."""
    top, total = (stats[..., i, :plan.rows].reshape(*sums.shape[:4]) for i in (0, 1))
    live = _live(jnp.arange(plan.splits), lengths[:, None], plan.window)[0][:, None, :, None]
    top = jnp.where(live, top, -jnp.inf)  # of a split that did not run this is memory as it was
    scale = jnp.where(live, jnp.exp2(top - top.max(2, keepdims=True)), 0.0)
    out = norm = 0.0
    for split in range(plan.splits):
        weight = scale[:, :, split, :, None]
        out += jnp.where(live[:, :, split, :, None], sums[:, :, split], 0.0) * weight
        norm += jnp.where(live[:, :, split], total[:, :, split], 0.0)[..., None] * weight
    return out / norm


def _scoped(*refs, plan):
    def lines(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, COLUMNS)),
                                                           plgpu.SwizzleTransform(128)))

    pl.run_scoped(partial(_body, *refs, plan=plan), lines(ROWS, plan.head_dim),
                  *[lines(STAGES, BLOCK, plan.head_dim)] * 2, plgpu.SMEM((2, plan.new, plan.head_dim), jnp.bfloat16),
                  plgpu.SMEM((ROWS, COLUMNS), jnp.float32), plgpu.SMEM((2, ROWS), jnp.float32),
                  plgpu.Barrier(), plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_barriers=STAGES),
                  plgpu.Barrier(num_barriers=2), collective_axes=())


def _body(q, new_k, new_v, lengths, cache_k, cache_v, sums, stats, q_tile, keys, values, rows, part, numbers,
          q_arrived, k_arrived, v_arrived, rows_arrived, *, plan):
    program = lax.axis_index("program")
    tile, rest = lax.rem(program, plan.tiles), lax.div(program, plan.tiles)
    split, rest = lax.rem(rest, plan.splits), lax.div(rest, plan.splits)
    head, row = lax.rem(rest, plan.kv_heads), lax.div(rest, plan.kv_heads)
    length = lengths[row]
    live, last = _live(split, length, plan.window)

    @pl.when(live)
    def _():
        begin = split * SPLIT
        if plan.window is not None:
            begin = jnp.maximum(begin, lax.div(jnp.maximum(length - plan.window + 1, 0), BLOCK) * BLOCK)
        cached = lax.div(jnp.maximum(jnp.minimum((split + 1) * SPLIT, length) - begin, 0) + BLOCK - 1, BLOCK)
        blocks = cached + last.astype(jnp.int32)

        def fetch(i):
            slot = lax.rem(i, STAGES)
            for new, cache, ring, arrived in ((new_k, cache_k, keys, k_arrived), (new_v, cache_v, values, v_arrived)):
                @pl.when(i < cached)
                def _(cache=cache, ring=ring, arrived=arrived):
                    plgpu.copy_gmem_to_smem(cache.at[row, head, pl.ds(begin + i * BLOCK, BLOCK)], ring.at[slot],
                                            arrived.at[slot])

                @pl.when(i >= cached)
                def _(new=new, ring=ring, arrived=arrived):
                    plgpu.copy_gmem_to_smem(new.at[row, head], ring.at[slot, pl.ds(0, NEW)], arrived.at[slot])

        plgpu.copy_gmem_to_smem(q.at[row, head, pl.ds(tile * plan.rows, plan.rows)], q_tile.at[pl.ds(0, plan.rows)],
                                q_arrived)
        for i in range(STAGES):
            pl.when(i < blocks)(partial(fetch, i))
        plgpu.barrier_wait(q_arrived)

        def step(i, carry):
            slot = lax.rem(i, STAGES)
            old = i < cached
            # of what is masked keys may be anything, but 0 times NaN is not 0: values may not
            start, end = jnp.where(old, begin + i * BLOCK, length), jnp.where(old, length, length + plan.new)
            plgpu.barrier_wait(k_arrived.at[slot])
            scores = _product(q_tile, keys.at[slot], plan, transposed=True)
            top, total, out = carry
            top, total, scale, weights = _softmax(scores, top, total, tile, start, length, end, plan)
            plgpu.barrier_wait(v_arrived.at[slot])
            pl.when(end - start < BLOCK)(partial(_clear, values.at[slot], end - start, plan))
            out = tuple(part * lax.broadcast_in_dim(scale, part.shape, (0,)) +
                        _product(weights, values.at[slot, :, pl.ds(c * COLUMNS, COLUMNS)], plan)
                        for c, part in enumerate(out))
            pl.when(i + STAGES < blocks)(partial(fetch, i + STAGES))
            return top, total, out

        chunks = plan.head_dim // COLUMNS
        top, total, out = lax.fori_loop(0, blocks, step, (
            plan.full((ROWS,), -1e30), plan.full((ROWS,), 0.0), (plan.full((ROWS, COLUMNS), 0.0),) * chunks))

        @pl.when(last & (tile == 0))
        def _():
            for i, new in enumerate((new_k, new_v)):
                plgpu.copy_gmem_to_smem(new.at[row, head, pl.ds(0, plan.new)], rows.at[i], rows_arrived.at[i])
            for i, cache in enumerate((cache_k, cache_v)):
                plgpu.barrier_wait(rows_arrived.at[i])
                plgpu.copy_smem_to_gmem(rows.at[i], cache.at[row, head, pl.ds(length, plan.new)])

        numbers[0], numbers[1] = top, total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(numbers, stats.at[row, head, split, tile])
        to = sums.at[row, head, split, pl.ds(tile * plan.rows, plan.rows)]
        for c, x in enumerate(out):
            part[...] = x
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(part.at[pl.ds(0, plan.rows)], to.at[:, pl.ds(c * COLUMNS, COLUMNS)])
            plgpu.wait_smem_to_gmem(0)


def _product(a, b, plan, *, transposed=False):
    """float32 a @ b, or a @ b.T; a: a reference or registers."""
    if plan.interpret:  # knows no transposed references
        return lax.dot_general(a[...], b[...], (((1,), (1 if transposed else 0,)), ((), ())),
                               preferred_element_type=jnp.float32)

    def run(acc):
        plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)) if transposed else b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, b.shape[0] if transposed else b.shape[1]), jnp.float32))


def _softmax(scores, top, total, tile, start, length, end, plan):
    """One block of online softmax (https://arxiv.org/abs/1805.02867), in powers of two."""
    position = start + plan.iota(scores.shape, 1)
    last = length + lax.div(plan.iota(scores.shape, 0) + tile * plan.rows, plan.group)
    visible = (position < end) & (position <= last)
    if plan.window is not None:
        visible &= position > last - plan.window
    scores = jnp.where(visible, scores * (LOG2E * plan.head_dim ** -0.5), -jnp.inf)
    highest = jnp.maximum(top, scores.max(1))
    weights = jnp.exp2(scores - lax.broadcast_in_dim(highest, scores.shape, (0,)))
    scale = jnp.exp2(top - highest)
    return highest, total * scale + weights.sum(1), scale, weights.astype(jnp.bfloat16)


def _clear(values, count, plan):
    """Zero the rows of values [BLOCK, D] from `count` on."""
    for c in range(plan.head_dim // COLUMNS):
        x = values.at[:, pl.ds(c * COLUMNS, COLUMNS)]
        kept = x[...].astype(jnp.float32)
        kept = plan.cast(kept, plgpu.Layout.WGMMA)
        x[...] = jnp.where(plan.iota(kept.shape, 0) < count, kept, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()
