"""One pass over the logits on a TPU (Mosaic).

A program takes a few rows and up to CHUNKS neighbouring chunks of them, 2 MB of float32, which the
pipeline fetches while the last block is reduced. Inside, it goes chunk by chunk, a few vector
registers at a time, and every chunk's numbers take a lane of their own in the outputs. With one
exponential and about 15 other operations a logit the rejection rule is bound by memory on every
TPU; the coupled rule's hash is about 110 operations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import noise
from pallas_kernels.rejection_sampling.summary import CHUNK, Summary

CHUNKS = 128  # of a program: each is a lane of its outputs


def summarize(logits: jax.Array, temperature: jax.Array, drafted: jax.Array | None,
              keys: jax.Array | None, ban: jax.Array | None, offset: jax.Array | None, *,
              banned_tokens: tuple[int, ...] = (), interpret: Any = False) -> Summary:
    """The `Summary` of R rows.

    Args:
      logits: [R, V], float32 or bfloat16.
      temperature: float32 [R]; 0 counts as 1.
      drafted: int32 [R], a global id or -1; None where keys are given.
      keys: uint32 [R, 2], or None for the rejection rule.
      ban: bool [R] or None; where true, `banned_tokens` are no candidates.
      offset: int32 scalar, the global id of column 0; None: the whole vocabulary is here.
      interpret: False, True or a `pltpu.InterpretParams`.
    """
    rows, vocab = logits.shape
    if logits.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"logits must be float32 or bfloat16, not {logits.dtype}")
    coupled, sharded = keys is not None, offset is not None
    names = ["top", "total", "weighted", "best", "best_id"]
    names += (["best_noise"] if coupled else ["drafted", "mass", "spill"] if sharded
              else ["drafted", "mass"])
    count = pl.cdiv(vocab, CHUNK)
    chunks, height = min(CHUNKS, count), min(32 // logits.dtype.itemsize, rows)
    # one array for all that is known of a row: each would be padded to 128 lanes by itself
    of_row = [jnp.zeros(rows, jnp.int32) if ban is None else ban.astype(jnp.int32)]
    of_row += [drafted] if keys is None else list(jax.lax.bitcast_convert_type(keys, jnp.int32).T)

    def by_row(width) -> pl.BlockSpec:
        return pl.BlockSpec((height, width), lambda i, j: (i, 0))

    out = pl.pallas_call(
        partial(_body, vocab=vocab, chunks=chunks, names=names,
                banned_tokens=banned_tokens if ban is not None else ()),
        grid=(pl.cdiv(rows, height), pl.cdiv(count, chunks)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM),
                  pl.BlockSpec((height, chunks * CHUNK), lambda i, j: (i, j)),
                  by_row(1), by_row(len(of_row))],
        out_specs=[pl.BlockSpec((height, chunks), lambda i, j: (i, j))] * len(names),
        out_shape=[jax.ShapeDtypeStruct((rows, pl.cdiv(count, chunks) * chunks), jnp.int32
                                        if name == "best_id" else jnp.float32) for name in names],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=f"summarize_{'coupled' if coupled else 'rejection'}",
        interpret=interpret,
    )(jnp.zeros(1, jnp.int32) if offset is None else jnp.reshape(offset, 1).astype(jnp.int32),
      logits, temperature[:, None], jnp.stack(of_row, 1))
    return Summary(**{name: x[:, :count] for name, x in zip(names, out, strict=True)})


def _body(offset, logits, temperature, of_row, *out, vocab, chunks, names, banned_tokens) -> None:
    """References: offset int32 [1], logits [height, chunks * CHUNK], temperature float32
    [height, 1], of_row int32 [height, 2 or 3] (banned or not, then the drafted id or the key's two
    words), out [height, chunks] each."""
    begin = pl.program_id(1) * chunks
    lane = jax.lax.broadcasted_iota(jnp.int32, out[0].shape, 1)

    def step(c, fields) -> tuple[jax.Array, ...]:
        at = pl.multiple_of(c * CHUNK, CHUNK)
        x = logits[:, pl.ds(at, CHUNK)].astype(jnp.float32)
        values = _summaries(x, (begin + c) * CHUNK, offset[0], temperature[...], of_row[...], vocab,
                            names, banned_tokens)
        return tuple(jnp.where(lane == c, value, field)
                     for value, field in zip(values, fields, strict=True))

    # the chunks beyond the vocabulary, of a row's last program, are not there
    live = jnp.minimum(chunks, pl.cdiv(vocab, CHUNK) - begin)
    fields = jax.lax.fori_loop(0, live, step, tuple(jnp.zeros(ref.shape, ref.dtype) for ref in out))
    for ref, field in zip(out, fields, strict=True):
        ref[...] = field


def _summaries(x: jax.Array, column: jax.Array, offset: jax.Array, temperature: jax.Array,
               of_row: jax.Array,
               vocab: int, names: list[str], banned_tokens: tuple[int, ...]) -> list[jax.Array]:
    """The fields `names`, each [rows, 1], of one chunk x [rows, CHUNK] that begins at `column`."""
    total, largest = partial(jnp.sum, axis=1,
                             keepdims=True), partial(jnp.max, axis=1, keepdims=True)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    ids = lane + (column + offset)
    if vocab % CHUNK:
        x = jnp.where(lane < vocab - column, x, -jnp.inf)
    scale = 1 / jnp.where(temperature > 0, temperature, 1.0)
    top = largest(x)
    d = (x - _finite(top)) * scale
    e = jnp.exp(d)
    # exp(-200) is 0; not NaN
    fields = {"top": top, "total": total(e), "weighted": total(e * jnp.maximum(d, -200.0))}
    candidates, leader = x, top
    if banned_tokens:
        banned = jnp.zeros(x.shape, bool)
        for token in banned_tokens:
            banned |= ids == jnp.where(of_row[:, :1] > 0, token, -1)
        candidates = jnp.where(banned, -jnp.inf, x)
        leader = largest(candidates)
        d = (candidates - _finite(leader)) * scale

    def lowest(scores, best) -> jax.Array:
        # lanes as floats, which every TPU can reduce
        return jnp.min(jnp.where(scores == best, lane.astype(jnp.float32), CHUNK - 1.0), axis=1,
                       keepdims=True).astype(jnp.int32)

    if "best_noise" in names:
        key = of_row[:, 1:2].astype(jnp.uint32), of_row[:, 2:3].astype(jnp.uint32)
        x0, x1 = noise.threefry2x32(*key, jnp.uint32(0), ids.astype(jnp.uint32))
        scores = d + jnp.where(temperature > 0, noise.gumbel(x0 ^ x1), 0.0)
        highest = largest(scores)
        winner = lowest(scores, highest)
        best = largest(jnp.where(lane == winner, candidates, -jnp.inf))
        drawn = highest - (best - _finite(leader)) * scale
        fields |= {"best": best, "best_id": winner + (column + offset),
                   "best_noise": jnp.where(best > -jnp.inf, drawn, 0.0)}
    else:
        fields |= {"best": leader, "best_id": lowest(candidates, leader) + (column + offset)}
        drafted = ids == of_row[:, 1:2]
        fields["drafted"] = largest(jnp.where(drafted, x, -jnp.inf))
        e = jnp.where(drafted, 0.0, jnp.exp(d) if banned_tokens else e)
        below = lane < CHUNK - jax.lax.rem(offset, CHUNK)
        fields["mass"] = total(jnp.where(below, e, 0.0) if "spill" in names else e)
        fields["spill"] = total(jnp.where(below, 0.0, e))
    return [fields[name] for name in names]


def _finite(x: jax.Array) -> jax.Array:
    """x, or 0 where all of a chunk is -inf."""
    return jnp.where(x > -jnp.inf, x, 0.0)
