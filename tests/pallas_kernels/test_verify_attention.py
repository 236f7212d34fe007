"""The reference of verification against dense float64 attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.verify_attention import reference, verify_attention
from tests.pallas_kernels import oracle

attend = jax.jit(verify_attention)


def case(seed, lengths, t, size, heads=4, kv_heads=2, d=8, dtype=np.float32):
    rng = np.random.default_rng(seed)
    b = len(lengths)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return (normal(b, t, heads, d), normal(b, t, kv_heads, d), normal(b, t, kv_heads, d),
            normal(b, kv_heads, size, d), normal(b, kv_heads, size, d), jnp.asarray(lengths, jnp.int32))


def dense(q, k, v, cache_k, cache_v, lengths, window=None):
    out = []
    for i, length in enumerate(np.asarray(lengths)):
        keys, values = (np.concatenate([np.asarray(c[i]).swapaxes(0, 1)[:length], np.asarray(x[i])])
                        for c, x in ((cache_k, k), (cache_v, v)))
        out.append(oracle.attention(np.asarray(q[i], np.float64), keys, values, length, window))
    return np.stack(out)


@pytest.mark.parametrize("size, t", [(24, 1), (24, 8), (128, 2), (200, 1), (200, 5), (384, 8)])
def test_equals_dense_attention(size, t):
    lengths = [0, 1, 7, size // 2, size - t - 1, size - t]
    args = case(size + t, lengths, t, size)
    out, cache_k, cache_v = attend(*args)
    np.testing.assert_allclose(out, dense(*args), atol=2e-6)
    for cache, old, new in ((cache_k, args[3], args[1]), (cache_v, args[4], args[2])):
        for i, length in enumerate(lengths):
            np.testing.assert_array_equal(cache[i, :, length:length + t], np.asarray(new[i]).swapaxes(0, 1))
            np.testing.assert_array_equal(cache[i, :, :length], old[i, :, :length])
            np.testing.assert_array_equal(cache[i, :, length + t:], old[i, :, length + t:])


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_grouped_queries(heads, kv_heads):
    args = case(0, [3, 11], 3, 16, heads, kv_heads)
    np.testing.assert_allclose(attend(*args)[0], dense(*args), atol=2e-6)


@pytest.mark.parametrize("window", [1, 3, 128, 200])
def test_window(window):
    args = case(7, [0, 3, 140, 380], 4, 384)
    out = jax.jit(partial(verify_attention, window=window))(*args)[0]
    np.testing.assert_allclose(out, dense(*args, window), atol=2e-6)


def test_garbage_beyond_the_length_is_not_read():
    args = case(1, [5, 0, 140], 2, 256)
    poisoned = [c.at[0, :, 7:].set(1e30).at[1, :, 2:].set(1e30).at[2, :, 142:].set(1e30) for c in args[3:5]]
    np.testing.assert_array_equal(attend(*args)[0], attend(*args[:3], *poisoned, args[5])[0])


@pytest.mark.parametrize("size", [64, 384])
def test_a_row_does_not_depend_on_the_others(size):
    """Bit for bit, even where the longest row decides how many blocks are read."""
    args = case(2, [3, 40, 9, 17], 3, size)
    alone = attend(*args)[0]
    others = case(3, [3, 1, 58, 0] if size == 64 else [3, 1, 380, 200], 3, size)
    mixed = [jnp.concatenate([a[:1], b[1:]]) for a, b in zip(args, others, strict=True)]
    np.testing.assert_array_equal(attend(*mixed)[0][0], alone[0])


def test_large_scores_do_not_overflow():
    q, k, v, cache_k, cache_v, lengths = case(4, [200, 3], 2, 256)
    args = (q * 100, k * 100, v, cache_k * 100, cache_v, lengths)
    np.testing.assert_allclose(attend(*args)[0], dense(*args), atol=1e-4)


def test_bfloat16_keeps_its_dtype_and_accumulates_in_float32():
    args = case(5, [100, 250], 2, 256, dtype=jnp.bfloat16)
    out, cache_k, _ = attend(*args)
    assert out.dtype == cache_k.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), dense(*args), atol=0.02)


def test_blocks_beyond_the_longest_row_are_not_read():
    """NaN there would reach the result if they were."""
    assert reference.KV_BLOCK == 128
    args = case(6, [10, 90], 2, 512)
    poisoned = [c.at[:, :, 128:].set(jnp.nan) for c in args[3:5]]
    np.testing.assert_array_equal(attend(*args)[0], attend(*args[:3], *poisoned, args[5])[0])
