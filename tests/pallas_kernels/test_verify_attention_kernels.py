"""The kernels of `verify_attention` against dense float64 attention, race detection on.

Stated tolerances: 2e-6 with a float32 cache; 0.02 with a bfloat16 one, whose weights are rounded to bfloat16.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.verify_attention import shapes, verify_attention
from tests.pallas_kernels.interpreters import CHIPS, PLAIN, races_found
from tests.pallas_kernels.test_verify_attention import case, dense

ATOL = {"float32": 2e-6, "bfloat16": 0.02}


def few(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True)


def cases(sizes, heads, dims, dtypes, most=8):
    return st.fixed_dictionaries({
        "seed": st.integers(0, 2**32 - 1), "t": st.integers(1, most), "size": st.sampled_from(sizes),
        "fill": st.lists(st.sampled_from([0.0, 0.3, 0.499, 0.5, 0.9, 1.0]), min_size=1, max_size=4),
        "heads": st.sampled_from(heads), "d": st.sampled_from(dims), "dtype": st.sampled_from(dtypes),
        "window": st.sampled_from([None, 1, 5, 100, 300])})


def poisoned(args):
    """The same with NaN wherever nothing has been written yet."""
    q, k, v, cache_k, cache_v, lengths = args
    empty = (jnp.arange(cache_k.shape[2]) >= lengths[:, None])[:, None, :, None]
    return q, k, v, jnp.where(empty, jnp.nan, cache_k), jnp.where(empty, jnp.nan, cache_v), lengths


def check(implementation, seed, t, size, fill, heads, d, dtype, window):
    """fill: of the room that each row's cache has, how much is taken."""
    lengths = [int(f * (size - t)) for f in fill]
    args = case(seed, lengths, t, size, *heads, d, getattr(jnp, dtype))
    run = partial(verify_attention, window=window, implementation=implementation)
    out, *caches = run(*poisoned(args))
    np.testing.assert_allclose(np.asarray(out, np.float64), dense(*args, window), atol=ATOL[dtype])
    for cache, old, new in zip(caches, args[3:5], args[1:3], strict=True):
        for i, length in enumerate(lengths):
            np.testing.assert_array_equal(cache[i, :, length:length + t], new[i].swapaxes(0, 1))
            np.testing.assert_array_equal(cache[i, :, :length], old[i, :, :length])


# sizes that blocks divide: the TPU interpreter with races takes no others
RACING = cases([16, 48, 128, 512, 1024], [(4, 2), (3, 1), (6, 2)], [64, 128], ["float32", "bfloat16"],
               most=16)


@few(10)
@given(RACING)
@example(dict(seed=0, t=8, size=1024, fill=[0.0, 1.0, 0.499], heads=(4, 2), d=128, dtype="bfloat16", window=None))
def test_tpu(case):
    check(CHIPS["tpu"], **case)
    assert not races_found("tpu")


@pytest.mark.slow
@few(300)
@given(RACING)
def test_tpu_in_full(case):
    check(CHIPS["tpu"], **case)
    assert not races_found("tpu")


# 24 query heads to one of the cache: up to 192 rows, in turns of two warpgroups
ON_GPU = cases([16, 48, 128, 640, 1024], [(4, 2), (3, 1), (24, 1)], [64, 128], ["float32", "bfloat16"])


@few(6)
@given(ON_GPU)
@example(dict(seed=0, t=8, size=1088, fill=[0.0, 1.0, 0.499], heads=(4, 2), d=128, dtype="bfloat16", window=None))
def test_gpu(case):
    check(CHIPS["gpu"], **case)
    assert not races_found("gpu")


@pytest.mark.slow
@few(150)
@given(ON_GPU)
def test_gpu_in_full(case):
    check(CHIPS["gpu"], **case)
    assert not races_found("gpu")


@few(4)
@given(cases([384, 640, 896], [(4, 2), (3, 1)], [64], ["float32", "bfloat16"]))
def test_a_cache_that_no_block_divides(case):
    check(PLAIN, **case)


@pytest.mark.parametrize("implementation", [PLAIN, CHIPS["gpu"]], ids=["tpu", "gpu"])
def test_a_row_does_not_depend_on_the_others(implementation):
    """Bit for bit: others that are longer, shorter or absent."""
    args = case(2, [600, 40, 9, 0], 3, 1024, d=64, dtype=jnp.bfloat16)
    run = jax.jit(partial(verify_attention, implementation=implementation))
    out = run(*args)[0]
    others = case(3, [600, 1000, 580, 700], 3, 1024, d=64, dtype=jnp.bfloat16)
    mixed = [jnp.concatenate([a[:1], b[1:]]) for a, b in zip(args, others, strict=True)]
    np.testing.assert_array_equal(run(*mixed)[0][0], out[0])
    np.testing.assert_array_equal(run(*(x[:1] for x in args))[0][0], out[0])


SMALL = ("smollm2-135m-h9:3-b1-t1-s256-float32", "qwen3-8b-h32:8-b1-t4-s4096-bfloat16")
REAL = [pytest.param(s, marks=() if s.name in SMALL else pytest.mark.slow, id=s.name) for s in shapes.SHAPES
        if s.kv_bytes(s.size) < 600e6]


@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape):
    """Against the reference: dense float64 attention takes too long."""
    lengths = np.random.default_rng(0).integers(0, shape.size - shape.t + 1, shape.batch)
    args = case(1, lengths, shape.t, shape.size, shape.heads, shape.kv_heads, shape.head_dim, getattr(jnp, shape.dtype))
    out, *caches = jax.jit(partial(verify_attention, window=shape.window, implementation=PLAIN))(*args)
    want, *reference = jax.jit(partial(verify_attention, window=shape.window))(*args)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(want, np.float32), atol=ATOL[shape.dtype])
    written = (np.arange(shape.size) < lengths[:, None] + shape.t)[:, None, :, None]
    for a, b in zip(caches, reference, strict=True):
        np.testing.assert_array_equal(jnp.where(written, a, 0), jnp.where(written, b, 0))


@pytest.mark.parametrize("change, message", [
    (dict(t=17), "17 new positions a row are more than 16"),
    (dict(size=200), "a cache of 200 positions is not a multiple of 128"),
    (dict(dtype=jnp.float16), "must both be float32 or bfloat16, not float16 and float16")])
def test_refusals_of_the_tpu(change, message):
    args = case(0, [3], **{"t": 2, "size": 64, **change})
    with pytest.raises(NotImplementedError, match=message):
        verify_attention(*args, implementation=PLAIN)


@pytest.mark.parametrize("change, message", [
    (dict(t=17), "17 new positions a row are more than 16"), (dict(d=32), "of size 64 or 128, not 32"),
    (dict(dtype=jnp.float16), "not both float32 must be bfloat16, not float16 and float16")])
def test_refusals_of_the_gpu(change, message):
    args = case(0, [3], **{"t": 2, "size": 64, "d": 64, "dtype": jnp.bfloat16, **change})
    with pytest.raises(NotImplementedError, match=message):
        verify_attention(*args, implementation=CHIPS["gpu"])
