"""Which program of a kernel takes what: as many as the live rows have parts, and none for what a
table has room for."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def schedule(first: jax.Array, last: jax.Array, live: jax.Array,
             most: int) -> tuple[jax.Array, ...]:
    """Programs one after the other, of parts first .. last, int32 [B], of every live row, bool [B].

    Returns the row of every program, int32 [most], garbage beyond those that there are; of every
    row its first program, int32 [B]; and how many programs there are, int32 [1]. most: a static
    bound on them.
    """
    programs = jnp.where(live, last - first + 1, 0)
    rows = jnp.arange(len(first), dtype=jnp.int32)
    row = jnp.repeat(rows, programs, total_repeat_length=most)
    return (row, jnp.cumsum(programs, dtype=jnp.int32) - programs,
            programs.sum(keepdims=True, dtype=jnp.int32))
