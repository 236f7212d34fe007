"""Matrices in 8 or 4 bits, and products with them. qwix quantises: symmetric, rounded to nearest, largest to largest.

8 bits have one scale a row. The product is one of integers: activations enter it as two int8 digits, 16 bits in all,
since one digit costs more acceptance than the weights' rounding does (for the outliers, https://arxiv.org/abs/2208.07339:
SmolLM2-135M's overlap with itself is 0.97 with two, 0.90 with one). No weight is converted, so that a byte of each is
read. 4 bits have a scale for every TILE inputs, and are converted as the product reads them; a CPU makes a copy first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.sharding import current_mesh

# qwix is imported where it is used: half a second, which only those who quantise should pay

BITS = (8, 4)
TILE = 32


@struct.dataclass
class Quantized:
    """A matrix [*out, in] as a `qwix.QArray`: integers of its shape, and scales [*out, 1] or [*out, in / tile]."""

    array: Any


def quantize(w: jax.Array, bits: int) -> Quantized:
    """w [*out, in] in 8 or 4 bits, off by at most half a step: the largest |w| that shares the scale over 254 or 14.

    In 4 bits a scale, in w's dtype, is shared by the largest divisor of `in` up to TILE; in 8 it is float32.
    """
    import qwix

    rows = tuple(range(w.ndim - 1))
    if bits == 8:
        return Quantized(qwix.quantize(w.astype(jnp.float32), jnp.int8, channelwise_axes=rows))
    tile = max(n for n in range(1, TILE + 1) if w.shape[-1] % n == 0)
    return Quantized(qwix.quantize(w.astype(jnp.float32), jnp.int4, channelwise_axes=rows,
                                   tiled_axes={w.ndim - 1: tile}, scale_dtype=w.dtype))


def dequantize(w: Quantized) -> jax.Array:
    """The matrix [*out, in] that products with w are products with, in its scales' dtype."""
    import qwix

    return qwix.dequantize(w.array)


def _digits(x: jax.Array) -> Any:
    """x [..., in] as a QArray [2, ..., in] of int8, whose sum over the first axis is x to within max |x| / 64,516."""
    import qwix

    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    steps = x / scale
    first = jnp.round(steps)
    second = jnp.round((steps - first) * 254)  # a remainder of half a step is 127
    return qwix.QArray(jnp.stack([first, second]).astype(jnp.int8), jnp.stack([scale, scale / 254]))


def product(x: jax.Array, w: Quantized) -> jax.Array:
    """x [..., in] times w [*out, in] -> float32 [..., *out]."""
    import qwix

    array, shape = w.array, (*x.shape[:-1], *w.array.shape[:-1])
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:  # as `layers.linear`: two dimensions for XLA's fast paths, more for sharding
        x = x.reshape(-1, x.shape[-1])
        array = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), array)
    if array.qvalue.dtype == jnp.int8:
        # two digits are also two rows at least: on a CPU one row times int8 takes eight times as long
        digits = _digits(x)
        y = qwix.dot_general(digits, array, (((digits.ndim - 1,), (array.ndim - 1,)), ((), ()))).sum(0)
    else:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        y = qwix.dot_general(x, array, (((x.ndim - 1,), (array.ndim - 1,)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)
    return y.reshape(shape)
