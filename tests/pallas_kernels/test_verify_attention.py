"""The reference of verification against dense float64 attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.verify_attention import verify_attention
from tests.pallas_kernels import oracle

attend = jax.jit(verify_attention)


def case(seed, lengths, t, size, heads=4, kv_heads=2, d=8, dtype=np.float32, block=128):
    """Rows with room for `size` positions each, in blocks of at most `block` that lie anywhere in
    the pool."""
    rng = np.random.default_rng(seed)
    b, block = len(lengths), min(block, size)
    columns = -(-size // block)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    blocks = b * columns + 2
    table = rng.permutation(blocks)[:b * columns].reshape(b, columns)
    return (normal(b, t, heads, d), normal(b, t, kv_heads, d), normal(b, t, kv_heads, d),
            normal(blocks, kv_heads, block, d), normal(blocks, kv_heads, block, d),
            jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32))


def rows(pool, table):
    """What the blocks of every row hold, [B, H_kv, S, D]."""
    pool = np.asarray(pool)[np.asarray(table)].swapaxes(1, 2)
    return pool.reshape(*pool.shape[:2], -1, pool.shape[-1])


def with_rows(pool, table, values):
    """The pool with values [B, H_kv, S, D] in the blocks of the rows."""
    b, heads, _, d = values.shape
    blocks = values.reshape(b, heads, table.shape[1], -1, d).swapaxes(1, 2)
    return pool.at[table].set(jnp.asarray(blocks, pool.dtype))


def dense(q, k, v, pool_k, pool_v, table, lengths, window=None, together=None):
    out = []
    cached = rows(pool_k, table), rows(pool_v, table)
    for i, length in enumerate(np.asarray(lengths)):
        keys, values = (np.concatenate([c[i].swapaxes(0, 1)[:length], np.asarray(x[i])])
                        for c, x in zip(cached, (k, v), strict=True))
        out.append(oracle.attention(np.asarray(q[i], np.float64), keys, values, length, window,
                                    together))
    return np.stack(out)


def beyond(args, value):
    """The arguments with `value` at all positions of the rows that nothing has been written to."""
    q, k, v, *pools, table, lengths = args
    held = [rows(pool, table) for pool in pools]
    empty = (np.arange(held[0].shape[2]) >= np.asarray(lengths)[:, None])[:, None, :, None]
    pools = [with_rows(pool, table, np.where(empty, value, x))
             for pool, x in zip(pools, held, strict=True)]
    return q, k, v, *pools, table, lengths


@pytest.mark.parametrize("size, t, block",
                         [(24, 1, 128), (24, 8, 16), (128, 2, 128), (208, 5, 16), (384, 8, 128)])
def test_equals_dense_attention(size, t, block):
    """Over the edge of a block too; nothing is written but the new positions, in the rows' own
    blocks."""
    lengths = [0, 1, 7, block - 2, size // 2, size - t - 1, size - t]
    lengths = [min(n, size - t) for n in lengths]
    args = case(size + t, lengths, t, size, block=block)
    table = args[5]
    out, *pools = attend(*args)
    np.testing.assert_allclose(out, dense(*args), atol=2e-6)
    for pool, old, new in zip(pools, args[3:5], args[1:3], strict=True):
        want = rows(old, table)
        for i, length in enumerate(lengths):
            want[i, :, length:length + t] = np.asarray(new[i]).swapaxes(0, 1)
        np.testing.assert_array_equal(pool, with_rows(old, table, want))


def test_a_dead_row_writes_nothing_and_is_zeros():
    """Wherever the rest of its line points."""
    args = case(8, [140, 20, 0], 3, 256)
    *front, table, lengths = args
    table = table.at[1, 0].set(len(args[3])).at[2].set(len(args[3]) + 5)
    out, *pools = attend(*front, table, lengths)
    want, *alone = attend(*(x[:1] for x in front[:3]), *front[3:], table[:1], lengths[:1])
    np.testing.assert_allclose(out[:1], want, atol=1e-6)
    np.testing.assert_array_equal(out[1:], 0)
    for pool, other in zip(pools, alone, strict=True):
        np.testing.assert_array_equal(pool, other)


def test_rows_share_blocks():
    """What two rows read in one block is what each would read in a block of its own."""
    args = case(9, [200, 150], 2, 256)
    *front, table, lengths = args
    shared = table.at[1, 0].set(table[0, 0])
    own = [pool.at[table[1, 0]].set(pool[table[0, 0]]) for pool in front[3:]]
    np.testing.assert_array_equal(attend(*front, shared, lengths)[0],
                                  attend(*front[:3], *own, table, lengths)[0])


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_grouped_queries(heads, kv_heads):
    args = case(0, [3, 11], 3, 16, heads, kv_heads)
    np.testing.assert_allclose(attend(*args)[0], dense(*args), atol=2e-6)


@pytest.mark.parametrize("window", [1, 3, 128, 200])
def test_window(window):
    args = case(7, [0, 3, 140, 380], 4, 384)
    out = jax.jit(partial(verify_attention, window=window))(*args)[0]
    np.testing.assert_allclose(out, dense(*args, window), atol=2e-6)


@pytest.mark.parametrize("window, together", [(None, "whole"), (3, "whole"), (3, "causal")])
def test_slots_of_one_draft(window, together):
    args = case(7, [0, 2, 140, 380], 4, 384)
    out = jax.jit(partial(verify_attention, window=window, together=together))(*args)[0]
    np.testing.assert_allclose(out, dense(*args, window, together), atol=2e-6)


def test_garbage_beyond_the_length_is_not_read():
    args = case(1, [5, 0, 140], 2, 256)
    np.testing.assert_array_equal(attend(*args)[0], attend(*beyond(args, 1e30))[0])


@pytest.mark.parametrize("size", [64, 384])
def test_a_row_does_not_depend_on_the_others(size):
    """Bit for bit, even where the longest row decides how many blocks are read, and wherever its
    blocks lie."""
    args = case(2, [3, 40, 9, 17], 3, size)
    alone = attend(*args)[0]
    others = case(3, [3, 1, 58, 0] if size == 64 else [3, 1, 380, 200], 3, size)
    held = [with_rows(b, others[5][:1], rows(a, args[5])[:1])
            for a, b in zip(args[3:5], others[3:5], strict=True)]
    mixed = [jnp.concatenate([a[:1], b[1:]]) for a, b in zip(args[:3], others[:3], strict=True)]
    np.testing.assert_array_equal(attend(*mixed, *held, *others[5:])[0][0], alone[0])


def test_large_scores_do_not_overflow():
    q, k, v, pool_k, *rest = case(4, [200, 3], 2, 256)
    args = (q * 100, k * 100, v, pool_k * 100, *rest)
    np.testing.assert_allclose(attend(*args)[0], dense(*args), atol=1e-4)


def test_bfloat16_keeps_its_dtype_and_accumulates_in_float32():
    args = case(5, [100, 250], 2, 256, dtype=jnp.bfloat16)
    out, pool_k, _ = attend(*args)
    assert out.dtype == pool_k.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), dense(*args), atol=0.02)


def test_blocks_beyond_the_longest_row_are_not_read():
    """NaN there would reach the result if they were."""
    args = case(6, [10, 90], 2, 512)
    held = [rows(pool, args[5]) for pool in args[3:5]]
    for x in held:
        x[:, :, 128:] = np.nan
    poisoned = [with_rows(pool, args[5], x) for pool, x in zip(args[3:5], held, strict=True)]
    np.testing.assert_array_equal(attend(*args)[0], attend(*args[:3], *poisoned, *args[5:])[0])
