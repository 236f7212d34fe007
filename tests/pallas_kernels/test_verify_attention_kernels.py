"""The kernels of `verify_attention` against dense float64 attention, race detection on.

Stated tolerances: 2e-6 with a float32 cache; 0.02 with a bfloat16 one, whose weights are rounded to
bfloat16.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.implementation import Implementation
from pallas_kernels.verify_attention import gpu, shapes, verify_attention
from pallas_kernels.verify_attention.reach import TOGETHER
from tests.pallas_kernels.interpreters import CHIPS, PLAIN, races_found
from tests.pallas_kernels.test_verify_attention import case, dense, rows, with_rows

GPU = Implementation("gpu", interpret=replace(CHIPS["gpu"].interpret, out_of_bounds_reads="raise"))
"""Where a row has no block nothing may be read, not even if it is thrown away."""
ATOL = {"float32": 2e-6, "bfloat16": 0.02}


def few(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True)


def cases(sizes, heads, dims, dtypes, most=8, blocks=(128,)):
    return st.fixed_dictionaries({
        "seed": st.integers(0, 2**32 - 1), "t": st.integers(1, most),
        "size": st.sampled_from(sizes), "block": st.sampled_from(blocks), "siblings": st.booleans(),
        "fill": st.lists(st.sampled_from([0.0, 0.3, 0.499, 0.5, 0.9, 1.0, None]), min_size=1,
                         max_size=4), "heads": st.sampled_from(heads), "d": st.sampled_from(dims),
        "dtype": st.sampled_from(dtypes), "window": st.sampled_from([None, 1, 5, 100, 300]),
        "together": st.sampled_from(TOGETHER)})


def positions(table, size, begin, end):
    """Where positions begin .. end - 1 of a row lie in a pool: an index of blocks, and one of what
    is in them."""
    at = np.arange(begin, end)
    return table[at // size], at % size


def poisoned(args, t, window, together):
    """Pools that are NaN, and a table without a block, wherever no row may look."""
    pools, table, lengths = map(np.asarray, args[3:5]), np.asarray(args[5]), np.asarray(args[6])
    blocks, _, size, _ = args[3].shape
    held = np.zeros((blocks, size), bool)
    needed = np.full_like(table, blocks + 7)
    for line, own, length in zip(table, needed, lengths, strict=True):
        if line[0] >= blocks:
            own[:] = line
        else:
            first = (0 if window is None
                     else max(length - window + (together is None), 0) // size)
            held[positions(line, size, first * size, length)] = True
            own[first:-(-(length + t) // size)] = line[first:-(-(length + t) // size)]
            own[0] = line[0]
    return [np.where(held[:, None, :, None], x, np.array(np.nan, x.dtype)) for x in pools], needed


def check(implementation, seed, t, size, block, siblings, fill, heads, d, dtype, window,
          together=None):
    """fill: of the room that each row has, how much is taken; None: a dead row. Siblings share full
    blocks."""
    lengths = [int((0.7 if f is None else f) * (size - t)) for f in fill]
    *front, table, lengths = case(seed, lengths, t, size, *heads, d, getattr(jnp, dtype), block)
    block, dead = front[3].shape[2], np.array([f is None for f in fill])
    for i, length in enumerate(lengths):
        shared = min(lengths[0], length) // block if siblings and not dead[0] else 0
        table = table.at[i, :shared].set(table[0, :shared])
    want = np.where(dead[:, None, None, None], 0, dense(*front, table, lengths, window,
                                                            together))
    table = np.array(table)
    table[dead, 0] = len(front[3])
    held, needed = poisoned((*front, table, lengths), t, window, together)
    out, *pools = verify_attention(*front[:3], *map(jnp.asarray, held), jnp.asarray(needed),
                                   lengths, window=window, together=together,
                                   implementation=implementation)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=ATOL[dtype])
    for pool, old, new in zip(pools, held, front[1:3], strict=True):
        pool = np.array(pool)
        for line, length, x in zip(table[~dead], lengths[~dead], np.asarray(new)[~dead],
                                   strict=True):
            blocks, inside = positions(line, block, length, length + t)
            old[blocks, :, inside] = x
            blocks, inside = positions(line, block, length + t, -(-(length + t) // block) * block)
            pool[blocks, :, inside] = old[blocks, :, inside]  # beyond, where blocks were written
        np.testing.assert_array_equal(pool.astype(np.float32), old.astype(np.float32))


RACING = cases([16, 48, 128, 512, 1024], [(4, 2), (3, 1), (6, 2)], [64, 128],
               ["float32", "bfloat16"], most=16, blocks=(16, 128))


@few(10)
@given(RACING)
@example(dict(seed=0, t=8, size=1024, block=128, siblings=True, fill=[0.499, 1.0, None, 0.0],
              heads=(4, 2), d=128, dtype="bfloat16", window=None))
def test_tpu(case):
    check(CHIPS["tpu"], **case)
    assert not races_found("tpu")


@pytest.mark.slow
@few(300)
@given(RACING)
def test_tpu_in_full(case):
    check(CHIPS["tpu"], **case)
    assert not races_found("tpu")


def on_gpu(heads):
    return cases([16, 48, 128, 640, 1024], heads, [64, 128], ["float32", "bfloat16"],
                 blocks=(16, 64, 80, 128))


# over the edge of a block and of a split; in blocks smaller than a step; 192 rows, in turns of two
# warpgroups, more of them than programs
@few(2)
@given(on_gpu([(4, 2), (3, 1)]))
@example(dict(seed=0, t=8, size=1024, block=128, siblings=True, fill=[0.499, 1.0, None, 0.0],
              heads=(4, 2), d=128, dtype="bfloat16", window=None))
@example(dict(seed=0, t=8, size=640, block=16, siblings=True, fill=[0.499, 1.0], heads=(4, 2), d=64,
              dtype="float32", window=290, together="causal"))
@example(dict(seed=0, t=8, size=256, block=128, siblings=False, fill=[0.499, 0.1, None, 0.3],
              heads=(24, 1), d=64, dtype="bfloat16", window=None, together="whole"))
def test_gpu(case):
    check(GPU, **case)
    assert not races_found("gpu")


def test_rows_that_may_be_long_have_longer_splits_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "MOST_SPLITS", 1)
    check(GPU, seed=0, t=1, size=1008, block=16, siblings=False, fill=[0.9], heads=(2, 1), d=64,
          dtype="bfloat16", window=None)


@pytest.mark.slow
@few(150)
@given(on_gpu([(4, 2), (3, 1), (24, 1)]))
def test_gpu_in_full(case):
    check(GPU, **case)
    assert not races_found("gpu")


@pytest.mark.parametrize("implementation", [PLAIN, CHIPS["gpu"]], ids=["tpu", "gpu"])
def test_a_row_does_not_depend_on_the_others(implementation):
    """Bit for bit: others that are longer, shorter or absent, and blocks elsewhere in the pool."""
    args = case(2, [600, 40, 9, 0], 3, 1024, d=64, dtype=jnp.bfloat16)
    run = jax.jit(partial(verify_attention, implementation=implementation))
    out = run(*args)[0]
    others = case(3, [600, 1000, 580, 700], 3, 1024, d=64, dtype=jnp.bfloat16)
    held = [with_rows(b, others[5][:1], rows(a, args[5])[:1])
            for a, b in zip(args[3:5], others[3:5], strict=True)]
    mixed = [jnp.concatenate([a[:1], b[1:]]) for a, b in zip(args[:3], others[:3], strict=True)]
    np.testing.assert_array_equal(run(*mixed, *held, *others[5:])[0][0], out[0])
    np.testing.assert_array_equal(run(*(x[:1] for x in args[:3]), *args[3:5],
                                      *(x[:1] for x in args[5:]))[0][0], out[0])


SMALL = ("smollm2-135m-h9:3-b1-t1-s256-float32", "qwen3-8b-h32:8-b1-t4-s4096-bfloat16")
REAL = [pytest.param(s, marks=() if s.name in SMALL else pytest.mark.slow, id=s.name)
        for s in shapes.SHAPES if s.kv_bytes(s.size) < 600e6]


@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape):
    """Against the reference: dense float64 attention takes too long."""
    lengths = np.random.default_rng(0).integers(0, shape.size - shape.t + 1, shape.batch)
    args = case(1, lengths, shape.t, shape.size, shape.heads, shape.kv_heads, shape.head_dim,
                getattr(jnp, shape.dtype))
    out, *caches = jax.jit(partial(verify_attention, **shape.reach,
                                   implementation=PLAIN))(*args)
    want, *reference = jax.jit(partial(verify_attention, **shape.reach))(*args)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(want, np.float32),
                               atol=ATOL[shape.dtype])
    written = (np.arange(shape.size) < lengths[:, None] + shape.t)[:, None, :, None]
    for a, b in zip(caches, reference, strict=True):
        np.testing.assert_array_equal(*(np.where(written, rows(x, args[5]), 0) for x in (a, b)))


@pytest.mark.parametrize("change, message", [
    (dict(t=17), "17 new positions a row are more than 16"),
    (dict(size=40), "blocks of 40 positions are not a multiple of 16"),
    (dict(dtype=jnp.float16), "must both be float32 or bfloat16, not float16 and float16")])
def test_refusals_of_the_tpu(change, message):
    args = case(0, [3], **{"t": 2, "size": 64, **change})
    with pytest.raises(NotImplementedError, match=message):
        verify_attention(*args, implementation=PLAIN)


@pytest.mark.parametrize("change, message", [
    (dict(t=17), "17 new positions a row are more than 16"),
    (dict(d=32), "of size 64 or 128, not 32"),
    (dict(size=24), "blocks of 24 positions are not a multiple of 16"),
    (dict(dtype=jnp.float16), "not both float32 must be bfloat16, not float16 and float16")])
def test_refusals_of_the_gpu(change, message):
    args = case(0, [3], **{"t": 2, "size": 64, "d": 64, "dtype": jnp.bfloat16, **change})
    with pytest.raises(NotImplementedError, match=message):
        verify_attention(*args, implementation=CHIPS["gpu"])
