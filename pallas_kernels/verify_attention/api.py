"""The one signature of every implementation."""

from __future__ import annotations

from functools import partial

import jax

from pallas_kernels.implementation import REFERENCE, Implementation
from pallas_kernels.verify_attention import reference


def verify_attention(q: jax.Array, k: jax.Array, v: jax.Array, pool_k: jax.Array, pool_v: jax.Array,
                     table: jax.Array, lengths: jax.Array, *, window: int | None = None,
                     together: str | None = None,
                     implementation: Implementation = REFERENCE) -> tuple[jax.Array, jax.Array,
                                                                          jax.Array]:
    """Write T new keys and values a row into the row's blocks, and attend to all that each new
    position may see.

    Args:
      q: [B, T, H, D], rotated queries of the new positions.
      k, v: [B, T, H_kv, D], their rotated keys, and values.
      pool_k, pool_v: [blocks, H_kv, size, D], blocks of `size` positions, the same dtype as k and
        v.
      table: int32 [B, M], the row's blocks in order: position p lies in block table[b, p // size].
        Rows may share blocks, except those of their new positions. An entry of `blocks` or more is
        no block. A row whose first entry is none is dead: nothing of it is read or written.
      lengths: int32 [B], cached positions a row; new position t of a row sees the cached ones and
        0..t of the new. A live row has blocks for lengths + T positions, which must not exceed M *
        size.
      window: static; a position sees itself and the window - 1 before it. None: all before it.
      together: static. "causal" and "whole": the new positions are the slots of one draft, which
        all see the `window` cached positions before the first of them; and of the slots "causal"
        those up to their own, "whole" all of them.

    Returns:
      out [B, T, H, D], zeros for a dead row, and the two pools with positions lengths ..
      lengths+T-1 written. What lies beyond those in the blocks that were written may have changed
      too.

    The result of a row does not depend on the other rows, nor on where its blocks lie: the split of
    the KV length is fixed. The kernels read only the blocks that a row's length (and window)
    covers, and write in place where the pools are donated.

    Raises NotImplementedError where the kernel does not take these shapes.
    """
    if implementation.name == "reference":
        run = reference.verify_attention
    else:
        run = partial(implementation.load(__package__).verify_attention,
                      interpret=implementation.interpret)
    return run(q, k, v, pool_k, pool_v, table, lengths, window=window,
               together=together)
