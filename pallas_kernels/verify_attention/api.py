"""The one signature of every implementation."""

from __future__ import annotations

import jax

from pallas_kernels.verify_attention import reference


def verify_attention(q: jax.Array, k: jax.Array, v: jax.Array, cache_k: jax.Array, cache_v: jax.Array,
                     lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write T new keys and values a row into the cache, and attend to all that each new position may see.

    Args:
      q: [B, T, H, D], rotated queries of the new positions.
      k, v: [B, T, H_kv, D], their rotated keys, and values.
      cache_k, cache_v: [B, H_kv, S, D], the same dtype as k and v. lengths + T must not exceed S.
      lengths: int32 [B], cached positions a row; new position t of a row sees the cached ones and 0..t of the new.

    Returns:
      out [B, T, H, D], and the two caches with positions lengths .. lengths+T-1 written.

    The result of a row does not depend on the other rows: the split of the KV length is fixed.
    """
    return reference.verify_attention(q, k, v, cache_k, cache_v, lengths)
