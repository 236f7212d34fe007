"""Matrices in 8 or 4 bits, and products with them. qwix quantises: symmetric, rounded to nearest,
largest to largest.

Products are of integers: activations enter them as two int8 digits, 16 bits in all, since one digit
costs more acceptance than the weights' rounding does (for the outliers,
https://arxiv.org/abs/2208.07339: SmolLM2-135M's overlap with itself is 0.97 with two, 0.90 with
one). Every scale is of a row and enters after the product, so that XLA reads the integers as they
are: scales within a row cost a bfloat16 copy of the matrix, on TPUs and GPUs alike.

In 4 bits one scale a row is too coarse (overlap 0.45). So of every GROUP inputs the one in OUTLIERS
whose weights are largest has them in 8 bits, in a matrix of its own (0.64, as with a scale for
every 32 inputs): 5 bits a weight.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jspec.sharding import current_mesh, partition

# qwix is imported where it is used: half a second, which only those who quantise should pay

BITS = (8, 4)
GROUP, OUTLIERS = 32, 8
# ways at most that shards may split the inputs of a matrix in 4 bits and read only their own
# outliers
BLOCKS = 16


@struct.dataclass
class Quantized:
    """A matrix [*out, in] as a `qwix.QArray`: integers of its shape, and float32 scales [*out, 1].

    In 4 bits `outliers` [*out, groups * n] has n inputs of every group in 8 bits, which are zero in
    `array`, and `chosen` says which they are: int8 [groups, n, in / groups], one-hot. `layout` and
    `inputs` are `quantize`'s.
    """

    array: Any
    outliers: Any = None
    chosen: jax.Array | None = None
    layout: str = struct.field(pytree_node=False, default="rollout")
    inputs: str | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """[*out, in]."""
        return self.array.shape


def quantize(w: jax.Array, bits: int, layout: str = "rollout",
             inputs: str | None = None) -> Quantized:
    """w [*out, in] in 8 or 4 bits, off by at most half a step: the largest |w| that shares the
    scale over 254 or 14.

    A group of 4 bits is of the largest divisor of `in` up to GROUP. inputs: the logical axis that
    `in` is in `layout`; None: one that no mesh splits.
    """
    if bits == 8:
        return Quantized(_by_row(w, jnp.int8), layout=layout, inputs=inputs)
    size = w.shape[-1]
    group = max(n for n in range(1, GROUP + 1) if size % n == 0)
    largest = jnp.abs(w).max(range(w.ndim - 1)).reshape(-1, group)
    index = jax.lax.top_k(largest, -(-group // OUTLIERS))[1]
    columns = (index + group * jnp.arange(len(index))[:, None]).reshape(-1)
    rest = w * jnp.ones(size, w.dtype).at[columns].set(0)
    outliers = _take(w, columns, math.gcd(len(index), BLOCKS))
    return Quantized(_by_row(rest, jnp.int4), _by_row(outliers, jnp.int8),
                     jax.nn.one_hot(index, group, dtype=jnp.int8), layout, inputs)


def _take(w: jax.Array, columns: jax.Array, blocks: int) -> jax.Array:
    """w[..., columns], of which every one of `blocks` parts of w has as many, so that shards have
    their own.

    By products with zeros and ones, which are exact: a TPU gathers number by number.
    """
    width = w.shape[-1] // blocks
    chosen = jax.nn.one_hot(columns.reshape(blocks, -1) % width, width, dtype=w.dtype)
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
    return whole + (picked * w.chosen.astype(picked.dtype)).sum(-2).reshape(whole.shape)


def _digits(x: jax.Array) -> Any:
    """x [..., in] as a QArray [2, ..., in] of int8, whose sum over the first axis is x to within
    max |x| / 64,516."""
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
    mesh = current_mesh()
    if mesh.size <= 1:  # as `layers.linear`: two dimensions for XLA's fast paths, more for sharding
        array, outliers = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), (w.array, w.outliers))
        y = _product(x.reshape(-1, x.shape[-1]), w.replace(array=array, outliers=outliers))
        return y.reshape(*x.shape[:-1], *w.array.shape[:-1])
    # a mesh that splits the inputs must not split a group
    width = x.shape[-1] if w.chosen is None else w.chosen.shape[0]
    axes = partition(mesh, w.layout, (width,), (w.inputs,))[0]
    return _product(x, w) if axes is None else _product_of_parts(x, w, axes)


def _product_of_parts(x: jax.Array, w: Quantized, axes: str | tuple[str, ...]) -> jax.Array:
    """`product` where mesh axes split the inputs: each shard scales and adds up its own, and the
    sums that cross the mesh are in x's dtype, as without quantisation. (XLA would send the
    integers, up to 8 times as many bytes.)"""
    def part(x, w) -> jax.Array:
        return jax.lax.psum(_product(x, w).astype(x.dtype), axes)

    def spec(a, *leading) -> PartitionSpec:
        """Of the quantised arrays the last dimension is the inputs', or a scale's."""
        return PartitionSpec(*leading, *(None,) * (a.ndim - 1 - len(leading)),
                             axes if a.shape[-1] > 1 else None)

    batch = partition(current_mesh(), w.layout, x.shape[:1], ("batch",))[0]
    split = w.replace(array=jax.tree.map(spec, w.array), outliers=jax.tree.map(spec, w.outliers),
                      chosen=None if w.chosen is None else PartitionSpec(axes))
    return jax.shard_map(part, in_specs=(spec(x, batch), split), out_specs=PartitionSpec(batch),
                         check_vma=False)(x, w).astype(jnp.float32)


def _product(x: jax.Array, w: Quantized) -> jax.Array:
    # two digits are also two rows at least: on a CPU one row times int8 takes eight times as long
    digits = _digits(x)
    y = _dot(digits, w.array)
    if w.outliers is not None:
        y += _dot(digits.replace(qvalue=_outliers_of(digits.qvalue, w.chosen)), w.outliers)
    return y.sum(0)


def _outliers_of(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """x [..., in] at the chosen inputs, [..., groups * n]."""
    grouped = x.reshape(*x.shape[:-1], chosen.shape[0], 1, chosen.shape[2])
    return (grouped * chosen).sum(-1, dtype=x.dtype).reshape(*x.shape[:-1], -1)


def _dot(digits: Any, array: Any) -> jax.Array:
    import qwix

    array = array.replace(qvalue=array.qvalue.astype(jnp.int8))
    return qwix.dot_general(digits, array, (((digits.ndim - 1,), (array.ndim - 1,)), ((), ())))
