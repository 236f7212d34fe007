"""The one signature of every implementation."""

from __future__ import annotations

from functools import partial

import jax

from pallas_kernels.implementation import REFERENCE, Implementation
from pallas_kernels.verify_attention import reference


def verify_attention(q: jax.Array, k: jax.Array, v: jax.Array, cache_k: jax.Array, cache_v: jax.Array,
                     lengths: jax.Array, *, window: int | None = None,
                     implementation: Implementation = REFERENCE) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write T new keys and values a row into the cache, and attend to all that each new position may see.

    Args:
      q: [B, T, H, D], rotated queries of the new positions.
      k, v: [B, T, H_kv, D], their rotated keys, and values.
      cache_k, cache_v: [B, H_kv, S, D], the same dtype as k and v. lengths + T must not exceed S.
      lengths: int32 [B], cached positions a row; new position t of a row sees the cached ones and 0..t of the new.
      window: static; a position sees itself and the window - 1 before it. None: all before it.

    Returns:
      out [B, T, H, D], and the two caches with positions lengths .. lengths+T-1 written. What lies beyond those may
      have changed too.

    The result of a row does not depend on the other rows: the split of the KV length is fixed. The kernels read only
    the blocks that a row's length (and window) covers, and write in place where the caches are donated.

    Raises NotImplementedError where the kernel does not take these shapes.
    """
    if implementation.name == "reference":
        run = reference.verify_attention
    else:
        run = partial(implementation.load(__package__).verify_attention, interpret=implementation.interpret)
    return run(q, k, v, cache_k, cache_v, lengths, window=window)
