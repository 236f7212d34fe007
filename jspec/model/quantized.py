"""Matrices in 8 or 4 bits, and products with them. qwix quantises: symmetric, rounded to nearest, largest to largest.

Products are of integers: activations enter them as two int8 digits, 16 bits in all, since one digit costs more
acceptance than the weights' rounding does (for the outliers, https://arxiv.org/abs/2208.07339: SmolLM2-135M's overlap
with itself is 0.97 with two, 0.90 with one). Every scale is of a row and enters after the product, so that XLA reads
the integers as they are: scales within a row cost a bfloat16 copy of the matrix, on TPUs and GPUs alike.

In 4 bits one scale a row is too coarse (overlap 0.45). So of every GROUP inputs the one in OUTLIERS whose weights are
largest has them in 8 bits, in a matrix of its own (0.64, as with a scale for every 32 inputs): 5 bits a weight.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.sharding import current_mesh

# qwix is imported where it is used: half a second, which only those who quantise should pay

BITS = (8, 4)
GROUP, OUTLIERS = 32, 8
BLOCKS = 16  # ways at most that shards may split the inputs of a matrix in 4 bits and read only their own outliers


@struct.dataclass
class Quantized:
    """A matrix [*out, in] as a `qwix.QArray`: integers of its shape, and float32 scales [*out, 1].

    In 4 bits `outliers` [*out, groups * n] has n inputs of every group in 8 bits, which are zero in `array`, and
    `chosen` says which they are: int8 [groups, n, in / groups], one-hot.
    """

    array: Any
    outliers: Any = None
    chosen: jax.Array | None = None


def quantize(w: jax.Array, bits: int) -> Quantized:
    """w [*out, in] in 8 or 4 bits, off by at most half a step: the largest |w| that shares the scale over 254 or 14.

    A group of 4 bits is of the largest divisor of `in` up to GROUP.
    """
    if bits == 8:
        return Quantized(_by_row(w, jnp.int8))
    size = w.shape[-1]
    group = max(n for n in range(1, GROUP + 1) if size % n == 0)
    largest = jnp.abs(w).max(range(w.ndim - 1)).reshape(-1, group)
    index = jax.lax.top_k(largest, -(-group // OUTLIERS))[1]
    inputs = (index + group * jnp.arange(len(index))[:, None]).reshape(-1)
    rest = w * jnp.ones(size, w.dtype).at[inputs].set(0)
    return Quantized(_by_row(rest, jnp.int4), _by_row(_columns(w, inputs, math.gcd(len(index), BLOCKS)), jnp.int8),
                     jax.nn.one_hot(index, group, dtype=jnp.int8))


def _columns(w: jax.Array, inputs: jax.Array, blocks: int) -> jax.Array:
    """w[..., inputs], which are ascending by block and as many in each of `blocks`, so that shards have their own.

    By products with zeros and ones, which are exact: a TPU gathers number by number.
    """
    width = w.shape[-1] // blocks
    chosen = jax.nn.one_hot(inputs.reshape(blocks, -1) % width, width, dtype=w.dtype)
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    w = w.reshape(*w.shape[:-1], blocks, width)
    return jnp.einsum("...bi,boi->...bo", w, chosen, precision=precision).reshape(*w.shape[:-2], -1)


def _by_row(w: jax.Array, dtype: Any) -> Any:
    import qwix

    return qwix.quantize(w.astype(jnp.float32), dtype, channelwise_axes=range(w.ndim - 1))


def dequantize(w: Quantized) -> jax.Array:
    """The matrix float32 [*out, in] that products with w are products with."""
    import qwix

    whole = qwix.dequantize(w.array)
    if w.outliers is None:
        return whole
    groups, n, _ = w.chosen.shape
    picked = qwix.dequantize(w.outliers).reshape(*whole.shape[:-1], groups, n, 1)
    return whole + (picked * w.chosen).sum(-2).reshape(whole.shape)


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
    shape = *x.shape[:-1], *w.array.shape[:-1]
    mesh = current_mesh()
    matrices = w.array, w.outliers
    if mesh is None or mesh.size == 1:  # as `layers.linear`: two dimensions for XLA's fast paths, more for sharding
        x = x.reshape(-1, x.shape[-1])
        matrices = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), matrices)
    array, outliers = matrices
    # two digits are also two rows at least: on a CPU one row times int8 takes eight times as long
    digits = _digits(x)
    y = _dot(digits, array)
    if outliers is not None:
        y += _dot(digits.replace(qvalue=_outliers_of(digits.qvalue, w.chosen)), outliers)
    return y.sum(0).reshape(shape)


def _outliers_of(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """x [..., in] at the chosen inputs, [..., groups * n]."""
    grouped = x.reshape(*x.shape[:-1], chosen.shape[0], 1, chosen.shape[2])
    return (grouped * chosen).sum(-1, dtype=x.dtype).reshape(*x.shape[:-1], -1)


def _dot(digits: Any, array: Any) -> jax.Array:
    import qwix

    array = array.replace(qvalue=array.qvalue.astype(jnp.int8))
    return qwix.dot_general(digits, array, (((digits.ndim - 1,), (array.ndim - 1,)), ((), ())))
