"""Attention of a few new positions against KV blocks in a pool on a TPU (Mosaic).

One program takes one block of one row, all of this device's KV heads of it; the grid is as long as
the live rows' blocks together (`schedule`), so nothing beyond a length is fetched and the next
block, be it the next row's, is on its way while this one is reduced. A block that holds new
positions is completed in VMEM, where it lies anyway, and only the few tiles that changed are
written back: no block is read after it was written. (The pool is one operand, which is also the
result: were it two, as for several blocks a program, XLA would copy it.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.verify_attention.packing import pack, unpack
from pallas_kernels.verify_attention.reach import first_seen, seen
from pallas_kernels.verify_attention.schedule import schedule

TILE = 16  # positions of a tile of bfloat16 in memory, two tiles of float32
MAX_NEW = 16  # new positions a row: they lie in two tiles


def verify_attention(q: jax.Array, k: jax.Array, v: jax.Array, pool_k: jax.Array, pool_v: jax.Array,
                     table: jax.Array, lengths: jax.Array, *, window: int | None = None,
                     together: str | None = None,
                     interpret: Any = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.verify_attention`. interpret: False, True or a `pltpu.InterpretParams`.

    Raises NotImplementedError for more than MAX_NEW new positions, dtypes other than float32 and
    bfloat16, and blocks whose size is no multiple of TILE.
    """
    new, d = q.shape[1], q.shape[3]
    blocks, kv_heads, size = pool_k.shape[:3]
    columns = table.shape[1]
    if new > MAX_NEW:
        raise NotImplementedError(f"{new} new positions a row are more than {MAX_NEW}")
    if pool_k.dtype not in (jnp.float32, jnp.bfloat16) or q.dtype != pool_k.dtype:
        raise NotImplementedError("queries and pool must both be float32 or bfloat16, not "
                                  f"{q.dtype} and {pool_k.dtype}")
    if size % TILE:
        raise NotImplementedError(f"blocks of {size} positions are not a multiple of {TILE}")
    first = first_seen(lengths, window, together) // size
    last = (lengths + new - 1) // size
    row, begin, programs = schedule(first, last, table[:, 0] < blocks, table.size)
    packed = pack(q, kv_heads)

    def of_row(rows) -> pl.BlockSpec:
        return pl.BlockSpec((None, kv_heads, rows, d), lambda i, row, *_: (row[i], 0, 0, 0))

    def of_pool() -> pl.BlockSpec:
        def index(i, row, table, begin, first, *_) -> tuple[jax.Array, int, int, int]:
            r = row[i]
            # of a dead row it is anything
            column = jnp.clip(first[r] + i - begin[r], 0, columns - 1)
            return table[r * columns + column], 0, 0, 0

        return pl.BlockSpec((None, kv_heads, size, d), index)

    rows = packed.shape[2]
    buffer = pltpu.VMEM((kv_heads, size, d), pool_k.dtype)
    # flat, as memory for scalars pads rows; a row that is dead is not looked up
    scalars = (row, jnp.minimum(table, blocks - 1).ravel(), begin, first, last, lengths, programs)
    out, pool_k, pool_v = pl.pallas_call(
        partial(_body, new=new, window=window, together=together),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(jnp.maximum(programs[0], 1),),
            in_specs=[of_row(rows), of_row(new), of_row(new), of_pool(), of_pool()],
            out_specs=[of_row(rows)] + [pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2,))] +
                           [pltpu.VMEM((kv_heads, rows, width), jnp.float32)
                            for width in (1, 1, d)]),
        # said to be in HBM: else the compiler moves a pool that fits into VMEM there and back, all
        # of it, every cycle
        out_shape=[jax.ShapeDtypeStruct(packed.shape, packed.dtype),
                   *(pltpu.HBM(x.shape, x.dtype) for x in (pool_k, pool_v))],
        input_output_aliases={len(scalars) + 3: 1, len(scalars) + 4: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="verify_attention",
        interpret=interpret,
    )(*scalars, packed, k.swapaxes(1, 2), v.swapaxes(1, 2), pool_k, pool_v)
    live = (table[:, 0] < blocks)[:, None, None, None]
    return jnp.where(live, unpack(out, new), 0), pool_k, pool_v


def _body(row_of, table, begin_of, first_of, last_of, lengths, programs, q, new_k, new_v, block_k,
          block_v, out,
          pool_k, pool_v, whole_k, whole_v, sent, top, total, sums, *, new, window,
          together) -> None:
    """References: scalars int32, of `schedule`, table [B * M] and lengths [B]; of a row q and out
    [H_kv, new * group, D], new_k and new_v [H_kv, new, D]; of the block block_k and block_v, and as
    they are completed whole_k and whole_v, [H_kv, size, D]; the pools; of the online softmax top
    and total [H_kv, new * group, 1], sums [H_kv, new * group, D].
    """
    i = pl.program_id(0)
    row = row_of[i]
    length, size, columns = lengths[row], block_k.shape[1], table.shape[0] // lengths.shape[0]
    at = first_of[row] + i - begin_of[row]
    start = at * size
    attend = partial(_attend, q, top, total, sums, start=start, length=length, new=new,
                     window=window, together=together)

    @pl.when(at == first_of[row])
    def _() -> None:
        # not -inf: a row of the matrix unit whose first block is all masked must not compute inf -
        # inf
        top[...] = jnp.full(top.shape, -1e30, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    live = i < programs[0]  # one program is there even if every row is dead
    complete = start + size <= length

    @pl.when(live & complete)
    def _() -> None:
        attend(block_k, block_v, causal=False)

    @pl.when(live & jnp.logical_not(complete))
    def _() -> None:
        position = start + jax.lax.broadcasted_iota(jnp.int32, (size, q.shape[-1]), 0)
        for whole, cached, rows in ((whole_k, block_k, new_k), (whole_v, block_v, new_v)):
            for head in range(cached.shape[0]):
                # what lies beyond may be anything, and a weight of 0 does not keep NaN out of a sum
                x = jnp.where(position < length, cached[head], jnp.zeros((), cached.dtype))
                for t in range(new):
                    x = jnp.where(position == length + t, rows[head, t:t + 1], x)
                whole[head] = x
        width = min(2 * TILE, size)
        inside = jax.lax.div(jnp.maximum(length - start, 0), TILE) * TILE
        inside = pl.multiple_of(jnp.minimum(inside, size - width), TILE)
        block = table[row * columns + at]
        writes = [pltpu.make_async_copy(whole.at[:, pl.ds(inside, width)],
                                        pool.at[block, :, pl.ds(inside, width)], sent.at[n])
                  for n, (whole, pool) in enumerate(((whole_k, pool_k), (whole_v, pool_v)))]
        for write in writes:
            write.start()
        attend(whole_k, whole_v, causal=True)
        for write in writes:
            write.wait()

    @pl.when(at == last_of[row])
    def _() -> None:
        out[...] = (sums[...] / total[...]).astype(out.dtype)


def _attend(q, top, total, sums, keys, values, *, start, length, new, window, together,
            causal) -> None:
    """One block of online softmax (https://arxiv.org/abs/1805.02867)."""
    heads, rows, d = q.shape
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = dot("hrd,hcd->hrc", q[...], keys[...]) * d ** -0.5
    if causal or window is not None:
        position = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        offset = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1), rows // new)
        visible = seen(position, length, offset, new, window, together)
        scores = jnp.where(visible, scores, -jnp.inf)
    old = top[...]
    highest = jnp.maximum(old, scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    scale = jnp.exp(old - highest)
    top[...] = highest
    total[...] = total[...] * scale + weights.sum(-1, keepdims=True)
    sums[...] = sums[...] * scale + dot("hrc,hcd->hrd", weights.astype(values.dtype), values[...])
