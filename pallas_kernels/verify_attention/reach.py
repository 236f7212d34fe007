"""Which positions a new one sees; one statement for every implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TOGETHER = (None, "causal", "whole")
"""How new positions belong together, see `api.verify_attention`."""


def first_seen(lengths: jax.Array, window: int | None, together: str | None) -> jax.Array:
    """The first cached position that any new one of a row sees, int32 of lengths int32."""
    if window is None:
        return jnp.zeros_like(lengths)
    return jnp.maximum(lengths - window + int(together is None), 0)


def seen(position: jax.Array, length: jax.Array, offset: jax.Array, new: int, window: int | None,
         together: str | None) -> jax.Array:
    """Whether new position `offset` of `new`, after `length` cached ones, sees `position`; int32
    that broadcast, to bool."""
    last = length + (new - 1 if together == "whole" else offset)
    visible = position <= last
    if window is None:
        return visible
    return visible & (position > (last if together is None else length - 1) - window)
