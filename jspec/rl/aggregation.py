"""From losses of tokens to the loss of a batch: what a token of each answer counts.

It is computed once for all rows of a rollout, before they are cut into mini-batches, micro-batches
and shards, so that what those are changes nothing: their parts of the loss add up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jspec.choices import Aggregation


@struct.dataclass
class Totals:
    """What the sums over an update's tokens are divided by, float32 scalars.

    Attributes:
      tokens: how many are trained: metrics are means over them.
      shares: what the shares of a loss are parts of: the loss is sum(shares x loss) over it.
    """

    tokens: jax.Array
    shares: jax.Array


def token_shares(mask: jax.Array, group_size: int, aggregation: Aggregation,
                 length: int) -> tuple[jax.Array, jax.Array]:
    """What each trained token of a row counts, float32 [N], and what that is a part of, a float32
    scalar: the loss of a rollout is sum(mask x share x loss) / whole.

    - `token_mean` (DAPO, arXiv:2503.14476): the mean over all tokens; long answers weigh more.
    - `sequence_mean` (GRPO, arXiv:2402.03300): the mean over answers of each one's mean.
    - `prompt_mean`: the mean over prompts of the mean over all tokens of its answers.
    - `constant_length` (Dr. GRPO, arXiv:2503.20783): the sum over N x length.

    Rows without a trained token, and prompts with no other rows, are left out of the second's and
    the third's means; the fourth divides by a constant, whatever is in the rows.

    Args:
      mask: bool [N, T], the tokens that are trained.
      group_size, aggregation, length: static.
    """
    counts = jnp.sum(mask, axis=1, dtype=jnp.float32)
    if aggregation == "sequence_mean":
        return 1.0 / jnp.maximum(counts, 1.0), _number(counts > 0)
    if aggregation == "prompt_mean":
        of_prompts = counts.reshape(-1, group_size).sum(axis=1)
        share = jnp.repeat(1.0 / jnp.maximum(of_prompts, 1.0), group_size)
        return share, _number(of_prompts > 0)
    whole = (jnp.asarray(float(mask.shape[0] * length), jnp.float32)
             if aggregation == "constant_length" else jnp.maximum(counts.sum(), 1.0))
    return jnp.ones_like(counts), whole


def _number(there: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(there, dtype=jnp.float32), 1.0)
