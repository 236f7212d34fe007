"""Weights of tokens for the gap between the policy as the update computes it and as the verifier
did, which sampled them: in float32 next to nothing, in bfloat16 or with quantised rollouts not.

With a correction the loss is decoupled (arXiv:2110.00641): its ratio is of the policy now to the
policy that the update itself computes before its first step, and each token is weighted by
w = exp(gap), that one's probability over the one it was sampled with, without a gradient. Of w

- `tis` clips: truncated importance sampling (https://fengyao.notion.site/off-policy-rl);
- `icepop` drops tokens outside of the bounds (arXiv:2510.18855);
- `sequence_mask` drops answers whose geometric mean of w is outside of them, and keeps w as it is
  (NeMo RL's seq-mask-tis; TRL's sequence_mask takes the product instead).

Without one the ratio is to the verifier's probabilities themselves, so the gap is inside of it, and
its clip is what bounds the two together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

FARTHEST = 20.0
"""A gap counts as no farther from 0, in nats: its exponential must be a number."""


def correction(gap: jax.Array, mask: jax.Array, method: str, low: float,
               high: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weights of tokens, float32 [N, T], 0 outside of the mask and without a gradient.

    Args:
      gap: float32 [N, T], the update's own log-probability of each token before its first step,
        less that it was sampled with. mask: bool [N, T], the tokens that count; rows are whole
        answers.
      method: one of `choices.CORRECTIONS` but none. low, high: its bounds.

    Returns (weights, metrics to be averaged over the tokens, each [N, T]): `correction_weight`, and
    `correction_clipped` or `correction_masked`, whether a token's weight was at a bound, or 0 for
    being outside of them.
    """
    gap = jnp.clip(jnp.where(mask, jax.lax.stop_gradient(gap), 0.0), -FARTHEST, FARTHEST)
    each = jnp.exp(gap)
    judged = each
    if method == "sequence_mask":
        count = jnp.maximum(mask.sum(axis=1, keepdims=True, dtype=jnp.float32), 1.0)
        judged = jnp.exp(gap.sum(axis=1, keepdims=True) / count)
    outside = jnp.broadcast_to((judged < low) | (judged > high), mask.shape) & mask
    if method == "tis":
        weights, name = jnp.clip(each, low, high), "correction_clipped"
    else:
        weights, name = jnp.where(outside, 0.0, each), "correction_masked"
    weights = jnp.where(mask, weights, 0.0)
    return weights, {"correction_weight": weights, name: outside.astype(jnp.float32)}
