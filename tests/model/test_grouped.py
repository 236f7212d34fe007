"""Products of rows and their group's matrix, against a loop over the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspec.model.grouped import grouped
from jspec.model.quantized import dequantize, quantize

SIZES = np.array([0, 3, 0, 70, 1, 0], np.int32)
"""Groups of none, of one row, and of more than a tile has."""
ROWS = SIZES.sum() + 5


def case(dtype=np.float32):
    """x, w, and what a cotangent of the product is; NaN in rows of no group and groups of none."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(ROWS, 8)), rng.normal(size=(ROWS, 2, 6))
    w = rng.normal(size=(len(SIZES), 2, 6, 8))
    x[SIZES.sum():] = np.nan
    w[SIZES == 0] = np.nan
    return tuple(jnp.asarray(a, dtype) for a in (x, w, dy))


def by_row(x, w):
    """float64 [R, 2, 6]."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    groups = np.repeat(np.arange(len(SIZES)), SIZES)
    made = np.zeros((ROWS, *w.shape[1:-1]))
    made[:SIZES.sum()] = np.einsum("ri,r...i->r...", x[:SIZES.sum()], w[groups])
    return made


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_products_and_gradients_are_those_of_each_row(dtype, tolerance):
    """And nothing is read of what no row is of."""
    x, w, dy = case(dtype)
    made, back = jax.vjp(lambda x, w: grouped(x, w, jnp.asarray(SIZES)), x, w)
    np.testing.assert_allclose(made.astype(np.float32), by_row(x, w), atol=tolerance)
    dx, dw = back(dy)
    assert dx.dtype == dw.dtype == dtype
    groups, n = np.repeat(np.arange(len(SIZES)), SIZES), SIZES.sum()
    xs, ws, dys = (np.asarray(a, np.float64) for a in (x, w, dy))
    expected = np.zeros_like(xs)
    expected[:n] = np.einsum("rof,rofi->ri", dys[:n], ws[groups])
    np.testing.assert_allclose(dx.astype(np.float32), expected, atol=2 * tolerance)
    expected = np.zeros(ws.shape)
    np.add.at(expected, groups, np.einsum("rof,ri->rofi", dys[:n], xs[:n]))
    np.testing.assert_allclose(dw.astype(np.float32), expected, atol=4 * tolerance)


@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_may_be_quantised(bits):
    x, w, _ = case()
    w = jnp.where(jnp.isnan(w), 0, w)
    rounded = quantize(w, bits)
    made = jax.jit(grouped)(x, rounded, jnp.asarray(SIZES))
    np.testing.assert_allclose(made, by_row(x, dequantize(rounded)), atol=2e-3)
