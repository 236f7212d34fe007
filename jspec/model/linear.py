"""The product of activations and a weight matrix, plain or quantised."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jspec.model.adapted import Adapted, adapted_product
from jspec.model.quantized import Quantized, product
from jspec.sharding import current_mesh

# XLA's matrix product on a CPU keeps to one core where a side has few rows, as in decoding. Given a
# part of the other side for each core it is 1.3 to 2.6 times as fast (SmolLM2's shapes, 2 to 64
# rows); parts must not become too small.
FEW_ROWS, LEAST_PART = 64, 256


def linear(x: jax.Array, w: jax.Array | Quantized | Adapted, b: jax.Array | None = None,
           out_dtype: Any = None) -> jax.Array:
    """x [..., in] times w [*out, in], plus b [*out] -> [..., *out], in x's dtype, or in out_dtype.

    float32 stays float32: never TF32 or bfloat16 passes. w may be quantised, or have adapters.
    """
    if isinstance(w, Adapted):
        y = adapted_product(x, w, linear)
        return y if b is None else y + b.astype(y.dtype)
    if isinstance(w, Quantized):
        y = product(x, w).astype(out_dtype or x.dtype)
        return y if b is None else y + b.astype(y.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dot = partial(jax.lax.dot_general, precision=precision,
                  preferred_element_type=out_dtype or x.dtype)
    w = w.astype(x.dtype)
    if current_mesh().size > 1:
        y = dot(x, w, (((x.ndim - 1,), (w.ndim - 1,)), ((), ())))
    else:
        # of more dimensions, XLA's CPU compiler loses its fast paths; sharded ones must be kept
        # apart
        y = _product(dot, x, w.reshape(-1, w.shape[-1])).reshape(*x.shape[:-1], *w.shape[:-1])
    return y if b is None else y + b.astype(y.dtype)


def _product(dot: Callable, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [..., in] times matrix [out, in] -> [..., out], on one device; on a CPU each core gets a
    part of the matrix."""
    count, size = math.prod(x.shape[:-1]), matrix.shape[0]
    cores = range(2, (os.cpu_count() or 1) + 1)
    parts = max((n for n in cores if size % n == 0 and size // n >= LEAST_PART), default=1)

    def whole(x, matrix) -> jax.Array:
        return dot(x, matrix, (((x.ndim - 1,), (1,)), ((), ())))

    def by_core(x, matrix) -> jax.Array:
        each = jnp.broadcast_to(x.reshape(count, -1), (parts, count, x.shape[-1]))
        y = dot(matrix.reshape(parts, -1, matrix.shape[1]), each, (((2,), (2,)), ((0,), (0,))))
        return y.transpose(2, 0, 1).reshape(*x.shape[:-1], -1)

    @jax.custom_jvp
    def product(x, matrix) -> jax.Array:
        return jax.lax.platform_dependent(x, matrix, cpu=by_core, default=whole)

    @product.defjvp
    def product_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        # without it, training would save a copy of the matrix for its backward pass
        (x, matrix), (dx, dmatrix) = primals, tangents
        return product(x, matrix), whole(dx, matrix) + whole(x, dmatrix)

    return product(x, matrix) if 1 < count <= FEW_ROWS and parts > 1 else whole(x, matrix)
