"""Attention of a few new positions against blocks of a pool on a GPU: Mosaic GPU, Hopper.

A split is SPLIT cached positions of one KV head of one row, or more where a row may be so long that
it had over MOST_SPLITS. As many programs as the GPU holds at once go through the splits that the
live rows' lengths cover (`schedule`), whatever else a table has room for. A split goes in steps of
STEP positions: TMA brings their keys and values by turns from the row's blocks to a ring in shared
memory, 64 KB of it in each of the two programs that a multiprocessor holds, where about 40 KB on
their way saturate an H200. The new positions are one more step of the row's last split, whose
program also writes them into the row's blocks once all that it reads has arrived.

More than ROWS query rows are two warpgroups that read the same ring; their registers leave room for
one such program, whose ring is 128 KB. Still more are taken in turns, each of which reads the
positions again. What is float32 goes through registers to three bfloat16 tiles, which hold its 24
bits; of the nine products of parts, the three below 2^-24 are left out.

A split's sums, unnormalised, are T x group rows of float32: for 16 rows of 128 they are 3% of what
was read, for 64 rows 12%, written and read again by XLA, which puts them together.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.verify_attention.gpu_tiles import (
    COLUMNS,
    ROWS,
    STEP,
    Plan,
    clear_rows,
    cut,
    parts_of,
    product,
    softmax_step,
    wait_for_all,
)
from pallas_kernels.verify_attention.packing import pack, unpack
from pallas_kernels.verify_attention.reach import first_seen
from pallas_kernels.verify_attention.schedule import schedule

SPLIT = 512
MOST_SPLITS = 32  # XLA reads the sums of as many as there may be, live or not
MULTIPROCESSORS = 132  # of an H100 or H200; with fewer, some programs wait for the others
FEW = 2  # programs where they are interpreted: each takes several splits
NEW = 16  # new positions are padded to what a matrix instruction contracts at once
SMALLEST = 16  # block in positions, and what larger ones are multiples of


# references to GPU memory want a jit around them
@partial(jax.jit, static_argnames=("window", "together", "interpret"))
def verify_attention(q: jax.Array, k: jax.Array, v: jax.Array, pool_k: jax.Array, pool_v: jax.Array,
                     table: jax.Array, lengths: jax.Array, *, window: int | None = None,
                     together: str | None = None,
                     interpret: Any = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.verify_attention`. interpret: False, or an InterpretGPUParams.

    Raises NotImplementedError for queries and a pool that are not both float32 or both bfloat16,
    head sizes other than 64 and 128, more than NEW new positions, and blocks whose size is no
    multiple of SMALLEST.
    """
    b, new, _, d = q.shape
    blocks, kv_heads, size = pool_k.shape[:3]
    if d not in (64, 128):
        raise NotImplementedError(f"heads must be of size 64 or 128, not {d}")
    if new > NEW:
        raise NotImplementedError(f"{new} new positions a row are more than {NEW}")
    if q.dtype not in (jnp.float32, jnp.bfloat16) or pool_k.dtype != q.dtype:
        raise NotImplementedError("queries and pool that are not both float32 must be bfloat16, "
                                  f"not {q.dtype} and {pool_k.dtype}")
    if size % SMALLEST:
        raise NotImplementedError(f"blocks of {size} positions are not a multiple of {SMALLEST}")
    group = q.shape[2] // kv_heads
    packed = pack(q, kv_heads)
    several = new * group > ROWS
    # in float32 the parts of the queries would not leave shared memory for a second warpgroup
    warpgroups = 2 if several and q.dtype == jnp.bfloat16 else 1
    packed = _pad(packed, warpgroups * ROWS if several else 8)
    tiles = pl.cdiv(packed.shape[2], ROWS)
    split = SPLIT * pl.cdiv(table.shape[1] * size, SPLIT * MOST_SPLITS)
    splits = pl.cdiv(table.shape[1] * size, split)
    at_once = FEW if interpret else MULTIPROCESSORS * (2 if warpgroups == 1 else 1)
    plan = Plan(group, new, window, together, kv_heads, blocks, size, split, splits,
                min(at_once, b * kv_heads * splits),
                 warpgroups, tiles, packed.shape[2] // tiles, d, q.dtype, bool(interpret))
    first, last = _splits(lengths, plan)
    row_of, begin, count = schedule(first, last, table[:, 0] < blocks, b * splits)
    pools = [jax.new_ref(x, memory_space=plgpu.GMEM) for x in (pool_k, pool_v)]
    shape = b, kv_heads, plan.splits, packed.shape[2]
    sums, stats = pl.kernel(
        partial(_scoped, plan=plan),
        out_type=[jax.ShapeDtypeStruct((*shape, d), jnp.float32),
                  jax.ShapeDtypeStruct((*shape[:3], tiles, 2, ROWS), jnp.float32)],
        mesh=plgpu.Mesh(grid=(plan.programs,), grid_names=("program",),
                        num_threads=warpgroups, thread_name="warpgroup"),
        compiler_params=plgpu.CompilerParams(approx_math=True,
                                             lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        name="verify_attention",
    )(jnp.stack(list(parts_of(packed))), _pad(k.swapaxes(1, 2), NEW), _pad(v.swapaxes(1, 2), NEW),
      row_of, begin, first, count, table, lengths, *pools)
    out = _combine(sums, stats, first, last, table[:, 0] < blocks,
                   plan)[:, :, :new * group].astype(q.dtype)
    return unpack(out, new), *map(jax.freeze, pools)


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    """Rows of x [B, H_kv, rows, D], zeros up to a multiple."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, 0)))


def _splits(lengths: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The first and the last split of every row, int32 [B]."""
    last = jnp.maximum(lengths - 1, 0) // plan.split
    first = first_seen(lengths, plan.window, plan.together)
    return jnp.minimum(first // plan.split, last), last


def _combine(sums: jax.Array, stats: jax.Array, first: jax.Array, last: jax.Array, live: jax.Array,
             plan: Plan) -> jax.Array:
    """Sums of the splits [B, H_kv, splits, rows, D] to the output, one after the other: XLA chooses
    no order."""
    top, total = (stats[..., i, :plan.rows].reshape(*sums.shape[:4]) for i in (0, 1))
    splits = jnp.arange(plan.splits)
    ran = (live[:, None] & (splits >= first[:, None]) & (splits <= last[:, None]))[:, None, :, None]
    top = jnp.where(ran, top, -jnp.inf)  # of a split that did not run this is memory as it was
    scale = jnp.where(ran, jnp.exp2(top - top.max(2, keepdims=True)), 0.0)
    out = norm = 0.0
    for split in range(plan.splits):
        weight = scale[:, :, split, :, None]
        out += jnp.where(ran[:, :, split, :, None], sums[:, :, split], 0.0) * weight
        norm += jnp.where(ran[:, :, split], total[:, :, split], 0.0)[..., None] * weight
    return jnp.where(live[:, None, None, None], out / norm, 0.0)


def _scoped(*refs, plan) -> None:
    n, d = plan.warpgroups, plan.head_dim

    def lines(dtype, *shape) -> Any:
        return plgpu.SMEM(shape, dtype,
                          transforms=(plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)),
                                      plgpu.SwizzleTransform(128)))

    pl.run_scoped(partial(_body, *refs, plan=plan), lines(jnp.bfloat16, n * plan.parts, ROWS, d),
                  lines(plan.dtype, plan.slots, STEP, d),
                  lines(jnp.bfloat16, plan.parts, STEP, d) if plan.parts > 1 else None,
                  plgpu.SMEM((2, plan.new, d), plan.dtype),
                  plgpu.SMEM((n, ROWS, COLUMNS), jnp.float32),
                  plgpu.SMEM((n, 2, ROWS), jnp.float32), plgpu.Barrier(num_barriers=n * plan.parts),
                  plgpu.Barrier(num_barriers=plan.slots, num_arrivals=STEP // plan.run),
                  plgpu.Barrier(num_barriers=plan.slots, num_arrivals=n),
                  plgpu.Barrier(num_arrivals=n), plgpu.Barrier(num_barriers=2),
                  collective_axes="warpgroup")


def _body(q, new_k, new_v, row_of, begin_of, first_of, count, table, lengths, pool_k, pool_v, sums,
          stats, *scratch, plan) -> None:
    program = lax.axis_index("program")

    def take(n, _) -> None:
        """The n-th of this program's splits: heads lie beside each other, then splits, then
        rows."""
        number = n * plan.programs + program
        head, at = lax.rem(number, plan.kv_heads), lax.div(number, plan.kv_heads)
        row = row_of[at]
        _split(q, new_k, new_v, table, lengths[row], pool_k, pool_v, sums, stats, *scratch, row=row,
               head=head, split=first_of[row] + at - begin_of[row], plan=plan)

    lax.fori_loop(0, lax.div(count[0] * plan.kv_heads - program + plan.programs - 1, plan.programs),
                  take, None)


def _split(q, new_k, new_v, table, length, pool_k, pool_v, sums, stats, q_tiles, ring, tiles, rows,
           staged, numbers,
           q_arrived, arrived, used, meet, rows_arrived, *, row, head, split, plan) -> None:
    """One split of one head of a row.

    References in global memory: q bfloat16 [parts, B, H_kv, rows, D], new_k and new_v
    [B, H_kv, NEW, D], table int32 [B, M], the pools, sums float32 [B, H_kv, splits, rows, D], stats
    float32 [B, H_kv, splits, tiles, 2, ROWS]: the largest score and the sum of weights. In shared
    memory: q_tiles [warpgroups * parts, ROWS, D], ring [slots, STEP, D], tiles [parts, STEP, D],
    rows [2, new, D], staged [warpgroups, ROWS, COLUMNS], numbers [warpgroups, 2, ROWS], and
    barriers. length: int32 scalar.
    """
    warpgroup = lax.axis_index("warpgroup")
    last = split == lax.div(jnp.maximum(length - 1, 0), plan.split)

    def place(pool, position, count) -> Any:
        """Where `count` positions of the row lie, all in one block."""
        return pool.at[table[row, lax.div(position, plan.size)], head,
                       pl.ds(lax.rem(position, plan.size), count)]

    begin, stop = split * plan.split, jnp.minimum((split + 1) * plan.split, length)
    if plan.window is not None:
        first = first_seen(length, plan.window, plan.together)
        begin = jnp.maximum(begin, lax.div(first, plan.run) * plan.run)
    cached = lax.div(jnp.maximum(stop - begin, 0) + STEP - 1, STEP)
    steps = cached + last.astype(jnp.int32)

    def slot(i, item) -> jax.Array:
        return lax.rem(2 * i + item, plan.slots)

    def fetch(i, item) -> None:
        """What comes `item` (static) after step i's keys: its values, then the next step's keys."""
        step, to = i + item // 2, slot(i, item)
        new, pool = ((new_k, pool_k), (new_v, pool_v))[item % 2]

        @pl.when(step < cached)
        def _() -> None:
            for at in range(0, STEP, plan.run):
                # not beyond the last run, where the row may have no block: what is masked may be
                # any
                position = jnp.minimum(begin + step * STEP + at,
                                       lax.div(stop - 1, plan.run) * plan.run)
                plgpu.copy_gmem_to_smem(place(pool, position, plan.run),
                                        ring.at[to, pl.ds(at, plan.run)], arrived.at[to])

        @pl.when((step == cached) & last)
        def _() -> None:
            plgpu.copy_gmem_to_smem(new.at[row, head], ring.at[to, pl.ds(0, NEW)], arrived.at[to])
            for _ in range(STEP // plan.run - 1):
                plgpu.barrier_arrive(arrived.at[to])

    def refill(i, item) -> None:
        """Step i's keys (0) or values (1) have been used by this warpgroup."""
        @pl.when(i + (item + plan.slots) // 2 < steps)
        def _() -> None:
            if plan.warpgroups > 1:
                plgpu.barrier_arrive(used.at[slot(i, item)])

            @pl.when(warpgroup == 0)
            def _() -> None:
                if plan.warpgroups > 1:
                    plgpu.barrier_wait(used.at[slot(i, item)])
                fetch(i, item + plan.slots)

    mine = [q_tiles.at[warpgroup * plan.parts + i] for i in range(plan.parts)]

    def turn(n, _) -> None:
        tile = n * plan.warpgroups + warpgroup
        of_tile = pl.ds(tile * plan.rows, plan.rows)
        for i, to in enumerate(mine):
            plgpu.copy_gmem_to_smem(q.at[i, row, head, of_tile], to.at[pl.ds(0, plan.rows)],
                                    q_arrived.at[warpgroup * plan.parts + i])

        @pl.when(warpgroup == 0)
        def _() -> None:
            for item in range(plan.slots):
                fetch(0, item)

        for i in range(plan.parts):
            plgpu.barrier_wait(q_arrived.at[warpgroup * plan.parts + i])

        def step(i, carry) -> tuple[Any, ...]:
            old = i < cached
            start, end = jnp.where(old, begin + i * STEP,
                                   length), jnp.where(old, stop, length + plan.new)
            top, total, out = carry
            plgpu.barrier_wait(arrived.at[slot(i, 0)])
            keys = cut(ring.at[slot(i, 0)], tiles, end - start, plan)
            scores = product(mine, keys, plan, transposed=True)
            top, total, scale, weights = softmax_step(scores, top, total, tile, start, length, end,
                                                      plan)
            refill(i, 0)
            plgpu.barrier_wait(arrived.at[slot(i, 1)])
            # of what is masked keys may be anything, but 0 times NaN is not 0: values may not
            if plan.parts == 1:
                clear = partial(clear_rows, ring.at[slot(i, 1)], end - start, warpgroup, meet, plan)
                pl.when(end - start < STEP)(clear)
            values = cut(ring.at[slot(i, 1)], tiles, end - start, plan)
            out = tuple(x * lax.broadcast_in_dim(scale, x.shape, (0,)) +
                        product(weights, [part.at[:, chunk] for part in values], plan)
                        for x, chunk in zip(out, plan.chunks, strict=True))
            refill(i, 1)
            return top, total, out

        top, total, out = lax.fori_loop(0, steps, step, (
            plan.full((ROWS,), -1e30), plan.full((ROWS,), 0.0),
            tuple(plan.full((ROWS, COLUMNS), 0.0) for _ in plan.chunks)))
        numbers[warpgroup, 0], numbers[warpgroup, 1] = top, total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(numbers.at[warpgroup], stats.at[row, head, split, tile])
        for x, chunk in zip(out, plan.chunks, strict=True):
            staged[warpgroup] = x
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged.at[warpgroup, pl.ds(0, plan.rows)],
                                    sums.at[row, head, split, of_tile, chunk])
            plgpu.wait_smem_to_gmem(0)
        wait_for_all(meet, plan)  # the next turn, or split, fills the ring from its beginning

    writes = last & (warpgroup == 0)

    @pl.when(writes)
    def _() -> None:
        for i, new in enumerate((new_k, new_v)):
            plgpu.copy_gmem_to_smem(new.at[row, head, pl.ds(0, plan.new)], rows.at[i],
                                    rows_arrived.at[i])

    lax.fori_loop(0, plan.tiles // plan.warpgroups, turn, None)

    # all that this program reads has arrived, and no earlier split reads beyond its row's length
    @pl.when(writes)
    def _() -> None:
        for i in range(2):
            plgpu.barrier_wait(rows_arrived.at[i])

        def write(t, _) -> None:
            for i, pool in enumerate((pool_k, pool_v)):
                plgpu.copy_smem_to_gmem(rows.at[i, pl.ds(t, 1)], place(pool, length + t, 1))

        lax.fori_loop(0, plan.new, write, None)
        plgpu.wait_smem_to_gmem(0)
