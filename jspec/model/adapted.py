"""A frozen matrix and the trained product of two low-rank ones that is added to it: LoRA
(https://arxiv.org/abs/2106.09685).

What is multiplied with is the sum, W + scale B A, in the compute dtype: the very matrix that
rollouts are made with, so that bfloat16 rounds both alike. What the two factors are learned from
goes through the factors alone, and no gradient of the size of W exists.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# qwix is imported where it is used: half a second, which only those who quantise should pay


@struct.dataclass
class Adapted:
    """W + scale B A.

    Attributes:
      base: W, [*lead, out, in] in any floating dtype, or a `qwix.QArray` of that shape. Frozen.
      a: A, float32 [*lead, rank, in]. b: B, float32 [*lead, out, rank]. None, both: W alone.
      scale: static, alpha / rank.
    """

    base: Any
    a: jax.Array | None
    b: jax.Array | None
    scale: float = struct.field(pytree_node=False, default=1.0)

    def astype(self, dtype: Any) -> jax.Array:
        """The sum as one matrix. Added up in float32."""
        if self.a is None:
            return plain(self.base).astype(dtype)
        return merged(self.base, self.a, self.b, self.scale, dtype)


def merged(base: Any, a: jax.Array, b: jax.Array, scale: float, dtype: Any) -> jax.Array:
    """W + scale B A, [*lead, out, in]."""
    added = jnp.einsum("...or,...ri->...oi", b, a, precision=jax.lax.Precision.HIGHEST)
    return (plain(base).astype(jnp.float32) + scale * added).astype(dtype)


def plain(base: Any) -> jax.Array:
    """A frozen matrix as an array."""
    if not is_quantised(base):
        return base
    import qwix

    return qwix.dequantize(base)


def is_quantised(x: Any) -> bool:
    """Whether this is a `qwix.QArray`, of whatever leaves."""
    return hasattr(x, "qvalue")


def adapted_product(x: jax.Array, w: Adapted, dot: Any) -> jax.Array:
    """x [..., in] times w [out, in] -> what `dot(x, matrix)` gives of the whole matrix, in x's
    dtype. Gradients are of x, A and B."""
    if w.a is None:
        return dot(x, w.astype(x.dtype))
    return _product(dot, w.scale, x, w.base, w.a, w.b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dot: Any, scale: float, x: jax.Array, base: Any, a: jax.Array,
             b: jax.Array) -> jax.Array:
    return dot(x, merged(base, a, b, scale, x.dtype))


def _forward(dot: Any, scale: float, x: jax.Array, base: Any, a: jax.Array,
             b: jax.Array) -> tuple[jax.Array, tuple]:
    return _product(dot, scale, x, base, a, b), (x, base, a, b)


def _backward(dot: Any, scale: float, kept: tuple, dy: jax.Array) -> tuple:
    x, base, a, b = kept
    dx = dot(dy.astype(x.dtype), merged(base, a, b, scale, x.dtype).T)
    rows, changes = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).astype(x.dtype)
    through = dot(changes, b.T.astype(x.dtype))  # [rows, rank]
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST,
                      preferred_element_type=jnp.float32)
    da = product("nr,ni->ri", through, rows)
    db = product("no,nr->or", changes, dot(rows, a.astype(x.dtype)))
    return dx, None, scale * da, scale * db


_product.defvjp(_forward, _backward)
