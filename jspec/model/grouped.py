"""Products of rows and the matrix of each one's group, whose cost follows the rows: what no row is
of is not read. Rows come sorted by group, and there may be some that are of none.

A TPU runs the kernels that come with JAX: the weights' gradient of `ragged_dot` is dense there up
to JAX 0.10, and its gradient by the rows copies all weights. Elsewhere it is a loop over tiles of
rows: on a CPU `ragged_dot` computes every group for every row, and on a GPU it copies all weights
and takes 52 GB for the gradient of a block of Qwen3-30B-A3B's with 4,096 rows (this: 1.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jspec.model.linear import linear
from jspec.model.quantized import Quantized

FEW, MANY = (4,), (64, 8)
"""Rows that the loop computes together, where a group has few rows as in decoding, and where it has
many: as many of the first as there are, then of the second."""


def grouped(x: jax.Array, w: jax.Array | Quantized, sizes: jax.Array) -> jax.Array:
    """Rows x [R, in] times their group's matrix of w [E, *out, in]: [R, *out], in x's dtype.

    sizes int32 [E]: the first sizes[0] rows are of group 0, and so on. What is beyond all groups
    comes out as zeros, whatever is in it. A quantised w has no gradient.
    """
    if isinstance(w, Quantized):
        return _by_tiles(x, w, sizes)
    flat = w.reshape(w.shape[0], -1, w.shape[-1])
    return _grouped(x, flat, sizes).reshape(x.shape[0], *w.shape[1:-1])


@jax.custom_vjp
def _grouped(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped` with w [E, out, in]. (What is in the middle of a sum is kept in float32.)"""
    y = jax.lax.platform_dependent(x, w, sizes, tpu=_by_kernel, default=_by_tiles)
    return _within(y, sizes)


def _forward(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, tuple]:
    return _grouped(x, w, sizes), (x, w, sizes)


def _backward(kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    dx, dw = jax.lax.platform_dependent(x, w, sizes, dy, tpu=_kernel_backward,
                                        default=_tiles_backward)
    return _within(dx, sizes), dw, None


_grouped.defvjp(_forward, _backward)


def _within(y: jax.Array, sizes: jax.Array) -> jax.Array:
    """y [R, ...] with zeros beyond the groups, where kernels leave what was in memory."""
    inside = jnp.arange(y.shape[0]) < sizes.sum()
    return jnp.where(inside.reshape(-1, *(1,) * (y.ndim - 1)), y, 0)


def _rows_of_a_tile(rows: int, groups: int) -> int:
    """Of the TPU's kernels. A tile is computed once for every group that has rows in it."""
    mean = 2 ** round(math.log2(max(rows / groups / 2, 1)))
    return min(max(mean, 128), 512, -(-rows // 16) * 16)


def _divisor(size: int, most: int) -> int:
    """The largest tile of a matrix's side of `size` that leaves no part of one over, if any
    does."""
    fitting = [n for n in range(128, min(size, most) + 1, 128) if size % n == 0]
    return max(fitting, default=min(size, most))


def _kernel(name: str, a: jax.Array, b: jax.Array, sizes: jax.Array, rows: int, dtype: Any,
            **options: Any) -> jax.Array:
    """megablox's `gmm` or `tgmm`; `rows` of them, filled up to whole tiles, are along the first
    axis of both."""
    # imported where it is used: a CPU or a GPU has no need of it
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
    exact = a.dtype == jnp.float32
    most = 512 if exact or name == "tgmm" else 1024
    inner, outer = ((a.shape[1], b.shape[1]) if name == "tgmm" else
                    (a.shape[1], b.shape[1 if options["transpose_rhs"] else 2]))
    tiling = (_rows_of_a_tile(rows, len(sizes)), _divisor(inner, most), _divisor(outer, most))
    with jax.default_matmul_precision("highest" if exact else "default"):
        if name == "tgmm":
            return tgmm(a.swapaxes(0, 1), b, sizes, dtype, tiling)
        return gmm(a, b, sizes, dtype, tiling, **options)


def _filled(x: jax.Array, groups: int) -> jax.Array:
    return jnp.pad(x, ((0, -len(x) % _rows_of_a_tile(len(x), groups)), (0, 0)))


def _by_kernel(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    y = _kernel("gmm", _filled(x, len(w)), w.astype(x.dtype), sizes, len(x), x.dtype,
                transpose_rhs=True)
    return y[:len(x)]


def _kernel_backward(x: jax.Array, w: jax.Array, sizes: jax.Array,
                     dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    of, mine = (_filled(a, len(w)) for a in (dy, x))
    dx = _kernel("gmm", of, w.astype(x.dtype), sizes, len(x), x.dtype, transpose_rhs=False)
    return dx[:len(x)], _kernel("tgmm", of, mine, sizes, len(x), w.dtype)


def _tiles(rows: int, groups: int) -> tuple[int, ...]:
    return FEW if rows <= groups * min(FEW) else MANY


def _over_groups(rows: int, sizes: jax.Array, body: Callable[[jax.Array, Callable, Any], Any],
                 start: Any) -> Any:
    """body(group, over, carry) -> carry, of every group that has rows, in order.

    over(step, carry) -> carry goes over the group's rows in tiles: step(first row of the tile,
    which of its rows are the group's bool [tile, 1], carry) -> carry.
    """
    tiles = _tiles(rows, len(sizes))
    begins, order = jnp.cumsum(sizes) - sizes, jnp.argsort(sizes == 0, stable=True)

    def of_group(i: jax.Array, carry: Any) -> Any:
        group = order[i]
        begin, end = begins[group], begins[group] + sizes[group]

        def over(step: Callable, carry: Any) -> Any:
            first = begin
            for tile in tiles:
                count = (end - first) // tile if tile > min(tiles) else -(-(end - first) // tile)

                def at(j: jax.Array, carry: Any, first: jax.Array = first, tile: int = tile) -> Any:
                    row = first + j * tile
                    return step(row, (row + jnp.arange(tile) < end)[:, None], carry)

                carry = jax.lax.fori_loop(0, count, at, carry)
                first = first + count * tile
            return carry

        return body(group, over, carry)

    return jax.lax.fori_loop(0, (sizes > 0).sum(dtype=jnp.int32), of_group, start)


def _matrix(w: Any, group: jax.Array) -> Any:
    """One group's of w [E, ...], quantised or not: copied once, whatever the tiles."""
    def take(x: jax.Array) -> jax.Array:
        return x.at[group].get(mode="promise_in_bounds")

    if isinstance(w, Quantized):
        return w.replace(array=jax.tree.map(take, w.array), outliers=jax.tree.map(take, w.outliers))
    return take(w)


def _padded(x: jax.Array) -> jax.Array:
    """x [R, ...] with room for a tile that begins at its last row."""
    return jnp.pad(x, ((0, max(MANY)), (0, 0)))


def _by_tiles(x: jax.Array, w: jax.Array | Quantized, sizes: jax.Array) -> jax.Array:
    padded = _padded(x)

    def body(group, over, y) -> jax.Array:
        matrix = _matrix(w, group)

        def step(row, inside, y) -> jax.Array:
            # a tile's rows beyond its group are wrong, and the next one's tiles write them again
            some = linear(jax.lax.dynamic_slice_in_dim(padded, row, len(inside)), matrix)
            return jax.lax.dynamic_update_slice_in_dim(y, some, row, 0)

        return over(step, y)

    out = w.array.shape[1:-1] if isinstance(w, Quantized) else w.shape[1:-1]
    y = _over_groups(len(x), sizes, body, jnp.zeros((len(padded), *out), x.dtype))
    return _within(y[:len(x)], sizes)


def _tiles_backward(x: jax.Array, w: jax.Array, sizes: jax.Array,
                    dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    padded, cotangents = _padded(x), _padded(dy)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dot = partial(jax.lax.dot_general, precision=precision)

    def body(group, over, carry) -> tuple[jax.Array, jax.Array]:
        dx, dw = carry
        matrix = _matrix(w, group).astype(x.dtype)

        def step(row, inside, carry) -> tuple[jax.Array, jax.Array]:
            dx, mine = carry
            xs, dys = (jnp.where(inside, jax.lax.dynamic_slice_in_dim(a, row, len(inside)), 0)
                       for a in (padded, cotangents))
            some = dot(dys, matrix, (((1,), (0,)), ((), ())))
            return (jax.lax.dynamic_update_slice_in_dim(dx, some, row, 0),
                    mine + dot(dys, xs, (((0,), (0,)), ((), ()))).astype(mine.dtype))

        dx, mine = over(step, (dx, jnp.zeros(w.shape[1:], w.dtype)))
        return dx, dw.at[group].set(mine, mode="promise_in_bounds")

    dx, dw = _over_groups(len(x), sizes, body, (jnp.zeros_like(padded), jnp.zeros_like(w)))
    return dx[:len(x)], dw
