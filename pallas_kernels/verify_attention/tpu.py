"""Attention of a few new positions against a ragged cache on a TPU (Mosaic).

One program takes one block of one row, all of this device's KV heads of it; the grid is as long as the rows' blocks
together (a schedule made from the lengths beforehand), so nothing beyond a length is fetched and the next block, be it
the next row's, is on its way while this one is reduced. A block that holds new positions is completed in VMEM, where it
lies anyway, and only the few tiles that changed are written back: no block is read after it was written.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.verify_attention.packing import pack, unpack

# Keys of a block: large enough that fetching it hides what a program costs beside it (0.35 us), even where 2.7 TB/s do
BLOCK_BYTES = 512 * 1024
SMALLEST, LARGEST = 128, 512  # positions; half a block is read in vain at the end of a row
TILE = 16  # positions of a tile of bfloat16 in memory, two tiles of float32
MAX_NEW = 16  # new positions a row: they lie in two tiles


def _block(heads: int, size: int, head_dim: int, itemsize: int) -> int:
    fit = BLOCK_BYTES // (heads * max(head_dim, 128) * itemsize)
    return min(size, LARGEST, max(SMALLEST, fit // SMALLEST * SMALLEST))


def _schedule(lengths: jax.Array, new: int, window: int | None, block: int, longest: int):
    """Row and block, int32 [B * longest] each, of every program, the first and last block of every row, int32 [B], and
    how many programs there are."""
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window + 1, 0) // block
    last = (lengths + new - 1) // block
    counts = last - first + 1
    begin = jnp.cumsum(counts) - counts
    row = jnp.repeat(jnp.arange(len(lengths), dtype=jnp.int32), counts, total_repeat_length=len(lengths) * longest)
    return row, (jnp.arange(len(row)) - begin[row] + first[row]).astype(jnp.int32), first, last, counts.sum()


def verify_attention(q: jax.Array, k: jax.Array, v: jax.Array, cache_k: jax.Array, cache_v: jax.Array,
                     lengths: jax.Array, *, window: int | None = None, interpret: Any = False):
    """See `api.verify_attention`. interpret: False, True or a `pltpu.InterpretParams`.

    Raises NotImplementedError for more than MAX_NEW new positions, dtypes other than float32 and bfloat16, and caches
    whose size is no multiple of SMALLEST (of TILE, if they are smaller).
    """
    b, new, _, d = q.shape
    kv_heads, size = cache_k.shape[1:3]
    if new > MAX_NEW:
        raise NotImplementedError(f"{new} new positions a row are more than {MAX_NEW}")
    if cache_k.dtype not in (jnp.float32, jnp.bfloat16) or q.dtype != cache_k.dtype:
        raise NotImplementedError(f"queries and cache must both be float32 or bfloat16, not {q.dtype} and "
                                  f"{cache_k.dtype}")
    if size % (TILE if size < SMALLEST else SMALLEST):
        raise NotImplementedError(f"a cache of {size} positions is not a multiple of {SMALLEST}")
    block = _block(kv_heads, size, d, cache_k.dtype.itemsize)
    *schedule, programs = _schedule(lengths, new, window, block, pl.cdiv(size, block))
    packed = pack(q, kv_heads)

    def of_row(rows):
        return pl.BlockSpec((None, kv_heads, rows, d), lambda i, row, *_: (row[i], 0, 0, 0))

    def of_cache():
        return pl.BlockSpec((None, kv_heads, block, d), lambda i, row, at, *_: (row[i], 0, at[i], 0))

    rows = packed.shape[2]
    buffer = pltpu.VMEM((kv_heads, block, d), cache_k.dtype)
    scalars = (*schedule, lengths)
    out, cache_k, cache_v = pl.pallas_call(
        partial(_body, new=new, size=size, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(programs,),
            in_specs=[of_row(rows), of_row(new), of_row(new), of_cache(), of_cache()],
            out_specs=[of_row(rows)] + [pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2,))] +
                           [pltpu.VMEM((kv_heads, rows, width), jnp.float32) for width in (1, 1, d)]),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (packed, cache_k, cache_v)],
        input_output_aliases={len(scalars) + 3: 1, len(scalars) + 4: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="verify_attention",
        interpret=interpret,
    )(*scalars, packed, k.swapaxes(1, 2), v.swapaxes(1, 2), cache_k, cache_v)
    return unpack(out, new), cache_k, cache_v


def _body(row_of, block_of, first_of, last_of, lengths, q, new_k, new_v, block_k, block_v, out, cache_k, cache_v,
          whole_k, whole_v, sent, top, total, sums, *, new, size, window):
    i = pl.program_id(0)
    row, at = row_of[i], block_of[i]
    length, block = lengths[row], block_k.shape[1]
    start = at * block

    @pl.when(at == first_of[row])
    def _():
        # not -inf: a row of the matrix unit whose first block is all masked must not compute inf - inf
        top[...] = jnp.full(top.shape, -1e30, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    attend = partial(_attend, q, top, total, sums, start=start, length=length, new=new, window=window)
    complete = start + block <= length

    @pl.when(complete)
    def _():
        attend(block_k, block_v, causal=False)

    @pl.when(jnp.logical_not(complete))
    def _():
        position = start + jax.lax.broadcasted_iota(jnp.int32, (block, q.shape[-1]), 0)
        for whole, cached, rows in ((whole_k, block_k, new_k), (whole_v, block_v, new_v)):
            for head in range(cached.shape[0]):
                # what lies beyond may be anything, and a weight of 0 does not keep NaN out of a sum
                x = jnp.where(position < length, cached[head], jnp.zeros((), cached.dtype))
                for t in range(new):
                    x = jnp.where(position == length + t, rows[head, t:t + 1], x)
                whole[head] = x
        width = min(2 * TILE, block)
        inside = jax.lax.div(jnp.maximum(length - start, 0), TILE) * TILE
        inside = pl.multiple_of(jnp.minimum(inside, jnp.minimum(block, size - start) - width), TILE)
        writes = [pltpu.make_async_copy(whole.at[:, pl.ds(inside, width)],
                                        cache.at[row, :, pl.ds(pl.multiple_of(start + inside, TILE), width)],
                                        sent.at[n])
                  for n, (whole, cache) in enumerate(((whole_k, cache_k), (whole_v, cache_v)))]
        for write in writes:
            write.start()
        attend(whole_k, whole_v, causal=True)
        for write in writes:
            write.wait()

    @pl.when(at == last_of[row])
    def _():
        out[...] = (sums[...] / total[...]).astype(out.dtype)


def _attend(q, top, total, sums, keys, values, *, start, length, new, window, causal):
    """One block of online softmax (https://arxiv.org/abs/1805.02867)."""
    heads, rows, d = q.shape
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = dot("hrd,hcd->hrc", q[...], keys[...]) * d ** -0.5
    if causal or window is not None:
        position = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        last = length + jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1), rows // new)
        visible = position <= last
        if window is not None:
            visible &= position > last - window
        scores = jnp.where(visible, scores, -jnp.inf)
    old = top[...]
    highest = jnp.maximum(old, scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    scale = jnp.exp(old - highest)
    top[...] = highest
    total[...] = total[...] * scale + weights.sum(-1, keepdims=True)
    sums[...] = sums[...] * scale + dot("hrc,hcd->hrd", weights.astype(values.dtype), values[...])
