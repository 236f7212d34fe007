"""One pass over the logits on a GPU: Mosaic GPU, Hopper.

A row is cut into tiles of a few neighbouring chunks, contiguous in memory, and a warpgroup owns a
run of tiles. One bulk copy brings a tile to shared memory, 16-byte reads bring it to registers, and
while it is reduced there the next STAGES tiles are on their way. A chunk lies inside one warp: it
is reduced by shuffles. No warpgroup waits for another.
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

from pallas_kernels import noise
from pallas_kernels.rejection_sampling.summary import CHUNK, Summary

# One program a multiprocessor. 4 warpgroups may have 128 registers a thread, which is what the
# kernel wants. 2 tiles on their way to each make 64 (bfloat16) or 128 KB in flight a
# multiprocessor, where about 40 KB saturate an H200.
PROGRAMS, WARPGROUPS, STAGES = 132, 4, 2
LINE = 128  # bytes; a warpgroup's copy is a multiple of it
LOG2E, LN2 = math.log2(math.e), math.log(2)


def summarize(logits: jax.Array, temperature: jax.Array, drafted: jax.Array | None,
              keys: jax.Array | None, ban: jax.Array | None, offset: jax.Array | None, *,
              banned_tokens: tuple[int, ...] = (), interpret: Any = False) -> Summary:
    """The `Summary` of R rows.

    Args:
      logits: [R, V], float32 or bfloat16. A row is a multiple of 16 bytes, or of 128 if it is no
        longer than a tile.
      temperature: float32 [R]; 0 counts as 1.
      drafted: int32 [R], a global id or -1; None where keys are given.
      keys: uint32 [R, 2], or None for the rejection rule.
      ban: bool [R] or None; where true, `banned_tokens` are no candidates.
      offset: int32 scalar, the global id of column 0; None: the whole vocabulary is here.
      interpret: False, or an InterpretGPUParams.
    """
    rows, vocab = logits.shape
    if logits.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"logits must be float32 or bfloat16, not {logits.dtype}")
    plan = _Plan(vocab, logits.dtype, keys is not None, offset is not None,
                 banned_tokens if ban is not None else (), bool(interpret))
    multiple = LINE if plan.tiles == 1 else 16
    if vocab * logits.dtype.itemsize % multiple:
        raise NotImplementedError(f"a row of {vocab} {logits.dtype} logits is not a multiple of "
                                  f"{multiple} bytes")
    programs = min(PROGRAMS, rows * plan.tiles)
    shape = rows, plan.tiles * plan.chunks
    out = plgpu.kernel(
        partial(_body, plan=plan, workers=programs * WARPGROUPS),
        out_type=[jax.ShapeDtypeStruct(shape, jnp.int32 if name == "best_id" else jnp.float32)
                  for name in plan.fields],
        scratch_types=[plgpu.SMEM((WARPGROUPS * STAGES, plan.pad + plan.tile), logits.dtype),
                       plgpu.Barrier(num_barriers=WARPGROUPS * STAGES)],
        grid=(programs,), grid_names=("program",), num_threads=WARPGROUPS, thread_name="warpgroup",
        # Without barriers of its own: a warpgroup only writes what it does not read, and `_body`
        # has one before a copy. Approximate: 2^x in one instruction, to 2 ulp, and the noise's
        # logarithms to about 1e-6.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True,
                                             lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=f"summarize_{'coupled' if plan.coupled else 'rejection'}", interpret=interpret,
    )(logits, temperature, drafted if keys is None else keys,
      jnp.zeros(rows, jnp.int32) if ban is None else ban.astype(jnp.int32),
      jnp.zeros(1, jnp.int32) if offset is None else jnp.reshape(offset, 1))
    return Summary(**{name: x[:, :pl.cdiv(vocab, CHUNK)]
                      for name, x in zip(plan.fields, out, strict=True)})


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static, and how a tile lies in registers: as [chunks, parts, width], where a part is
    a vector of 16 bytes for each of the lanes that share a chunk.
    """

    vocab: int
    dtype: Any
    coupled: bool
    sharded: bool
    banned_tokens: tuple[int, ...]
    interpret: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the outputs, in the order of `_summaries`."""
        names = "top", "total", "weighted", "best", "best_id"
        if self.coupled:
            return *names, "best_noise"
        return (*names, "drafted", "mass") + (("spill",) if self.sharded else ())

    @property
    def chunks(self) -> int:
        """Of a tile. Hashing is long: small tiles share it out better; without it, what is done
        once a tile matters."""
        return 4 if self.coupled else 8

    @property
    def tile(self) -> int:
        return self.chunks * CHUNK

    @property
    def tiles(self) -> int:
        """Of a row."""
        return pl.cdiv(self.vocab, self.tile)

    @property
    def pad(self) -> int:
        """Elements of a line."""
        return LINE // self.dtype.itemsize

    @property
    def vector(self) -> int:
        return 16 // self.dtype.itemsize

    @property
    def width(self) -> int:
        return 128 // self.chunks * self.vector

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.chunks, CHUNK // self.width, self.width

    @property
    def layout(self) -> Any:
        """Neighbouring chunks to each of the 4 warps."""
        tiles = [(self.chunks, 1, self.width), (self.chunks // 4, 1, self.width), (self.vector,)]
        if self.chunks == 4:  # layouts must be written without what changes nothing
            return plgpu.Layout.TILED(plgpu.Tiling((tiles[0], tiles[2])), (-4,), (-2,), -1)
        return plgpu.Layout.TILED(plgpu.Tiling(tuple(tiles)), (-7,), (-4, -2), -1)

    def cast(self, x: jax.Array, layout: Any = None) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout or self.layout)

    def iota(self, dimension: int) -> jax.Array:
        return self.cast(lax.broadcasted_iota(jnp.int32, self.shape, dimension))

    def spread(self, x: jax.Array) -> jax.Array:
        return self.cast(lax.broadcast_in_dim(x, self.shape, (0,)))


def _body(logits, temperature, row_data, ban, offset, *refs, plan, workers) -> None:
    """References in global memory: logits [R, V], temperature float32 [R], row_data (drafted ids
    int32 [R], or keys uint32 [R, 2]), ban int32 [R], offset int32 [1], outputs [R, tiles * chunks]
    each. In shared memory: a ring of tiles [WARPGROUPS * STAGES, pad + tile], and their
    barriers."""
    *out, ring, arrived = refs
    tile, tiles, pad = plan.tile, plan.tiles, plan.pad
    warpgroup = lax.axis_index("warpgroup")
    worker, work = lax.axis_index("program") * WARPGROUPS + warpgroup, logits.shape[0] * tiles
    begin = lax.div(worker * work, workers)
    count = lax.div((worker + 1) * work, workers) - begin
    last = plan.vocab - (tiles - 1) * tile  # columns of a row's last tile
    reach = pl.cdiv(last, pad) * pad  # in whole lines: it may begin a little before the tile

    def place(i) -> tuple[jax.Array, jax.Array]:
        return lax.div(begin + i, tiles), lax.rem(begin + i, tiles)

    def slot(i) -> jax.Array:
        return warpgroup * STAGES + lax.rem(i, STAGES)

    def fetch(i) -> None:
        row, at = place(i)

        def copy(columns, to) -> None:
            plgpu.copy_gmem_to_smem(logits.at[row, columns], ring.at[slot(i), to],
                                    arrived.at[slot(i)],
                                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

        @pl.when(at < tiles - 1)
        def _() -> None:
            copy(pl.ds(at * tile, tile), pl.ds(pad, tile))

        @pl.when(at == tiles - 1)
        def _() -> None:
            copy(pl.ds(plan.vocab - reach, reach), pl.ds(pad + last - reach, reach))

    def load(i) -> jax.Array:
        if plan.interpret:  # knows neither layouts nor reshaped references
            return ring[slot(i), pl.ds(pad, tile)].reshape(plan.shape)
        return plan.cast(ring.at[slot(i), pl.ds(pad, tile)].reshape(plan.shape)[...])

    for i in range(STAGES):
        pl.when(i < count)(partial(fetch, i))

    def step(i, _) -> None:
        row, at = place(i)
        plgpu.barrier_wait(arrived.at[slot(i)])
        x = load(i).astype(jnp.float32)
        plgpu.commit_smem()  # every warp has read the tile
        pl.when(i + STAGES < count)(partial(fetch, i + STAGES))
        first = at * tile + offset[0]

        def write(plain) -> None:
            fields = _summaries(x, temperature[row], row_data.at[row], ban[row], first, offset[0],
                                plan, plain)
            for ref, field in zip(out, fields, strict=True):
                _store(ref.at[row, pl.ds(at * plan.chunks, plan.chunks)], field, plan)

        def inside(token) -> jax.Array:
            return (token >= first) & (token < first + tile)

        if plan.coupled:
            return write(False)
        plain = ~inside(row_data[row])
        for token in plan.banned_tokens:
            plain &= ~inside(token) | (ban[row] == 0)
        if plan.vocab % tile:
            plain &= at < tiles - 1
        pl.when(plain)(partial(write, True))
        pl.when(~plain)(partial(write, False))

    lax.fori_loop(0, count, step, None)


def _store(ref, x, plan) -> None:
    # JAX 0.12 wants to be told of a store that is not whole sectors
    if hasattr(plgpu, "store") and not plan.interpret:
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def _summaries(x, t, row_data, ban, first, offset, plan, plain) -> tuple[jax.Array, ...]:
    """The fields [chunks] of one tile x [chunks, parts, width] whose first id is `first`.

    plain: static; all of its columns exist, and none of its ids is banned or drafted.
    """
    def total(x) -> jax.Array:
        return x.sum(1).sum(1)  # inside lanes, then across them

    def largest(x) -> jax.Array:
        return x.max(1).max(1)

    def finite(leader) -> jax.Array:
        return jnp.where(leader > -jnp.inf, leader, 0.0)  # of a chunk of -inf any number will do

    scale = 1 / jnp.where(t > 0, t, 1.0)
    # in this order: what is the same for every tile would be kept from one to the next, in a
    # register for each logit
    ids = first + plan.iota(2) + plan.iota(0) * CHUNK + plan.iota(1) * plan.width
    if not plain:
        x = jnp.where(ids - offset < plan.vocab, x, -jnp.inf)
    top = leader = largest(x)
    # differences are all but exact, and 2^d is an instruction
    d = (x - plan.spread(finite(top))) * (scale * LOG2E)
    e = jnp.exp2(d)
    weighted = total(e * jnp.maximum(d, -200.0)) * LN2  # 2^-200 is 0, and 0 * -inf would be NaN
    candidates = x
    if not plain and plan.banned_tokens:
        for token in plan.banned_tokens:
            candidates = jnp.where(ids == jnp.where(ban > 0, token, -1), -jnp.inf, candidates)
        leader = largest(candidates)
    scores, highest = candidates, leader
    if plan.coupled:  # most of the work, and none of it for a greedy row
        under = candidates - plan.spread(finite(leader))
        scores = lax.cond(t > 0, lambda: under * scale
                          + noise.gumbel(noise.random_bits(row_data, ids)), lambda: under)
        highest = largest(scores)
    # the lowest id of the largest score: the lowest part first, which is a constant, then the
    # lowest column
    part = jnp.where(scores == plan.spread(highest), plan.iota(1), plan.shape[1]).min(1)
    flat = (plan.chunks, plan.width)
    chunk, lane = (plan.cast(lax.broadcasted_iota(jnp.int32, flat, i), plan.layout.reduce(1))
                   for i in (0, 1))
    best_id = (part * plan.width + (lane + chunk * CHUNK + first)).min(1)
    fields = top, total(e), weighted
    if plan.coupled:
        best = largest(jnp.where(ids == plan.spread(best_id), candidates, -jnp.inf))
        drawn = highest - (best - finite(leader)) * scale
        return *fields, best, best_id, jnp.where(best > -jnp.inf, drawn, 0.0)
    # in the layout of the others: a constant has none, and is not stored
    drafted_x = jnp.minimum(top, -jnp.inf)
    if not plain:
        drafted = ids == row_data[()]
        drafted_x = largest(jnp.where(drafted, x, -jnp.inf))
        if plan.banned_tokens:
            e = jnp.exp2((candidates - plan.spread(finite(leader))) * (scale * LOG2E))
        e = jnp.where(drafted, 0.0, e)
    fields = *fields, leader, best_id, drafted_x
    if not plan.sharded:
        return *fields, fields[1] if plain else total(e)
    below = ids < plan.iota(0) * CHUNK + (first + CHUNK - lax.rem(offset, CHUNK))
    return *fields, total(jnp.where(below, e, 0.0)), total(jnp.where(below, 0.0, e))
