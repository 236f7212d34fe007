"""What a draft is trained on: how far its distribution is from the policy's, at the sampling temperature.

Per position, with p the policy's distribution and q the draft's, both at that temperature, and the overlap
sum(min(p, q)) the probability that a draft from q is accepted (https://arxiv.org/abs/2211.17192):

- `kl`: forward KL, sum(p log(p / q)).
- `tv`: total variation, 1 - overlap (https://arxiv.org/abs/2310.08461).
- `overlap`: -log overlap, the negative log-likelihood of acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jspec.model import Policy, logits
from jspec.model.chunks import sum_over_chunks

LOSSES = ("kl", "tv", "overlap")


def divergence(log_p: jax.Array, log_q: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """(loss, overlap), float32 [...], of log p and log q float32 [..., V] over the draft's vocabulary.

    q sums to 1 over it; p need not: what it has outside is beyond the draft's reach, and counts as no overlap.
    """
    p = jnp.exp(log_p)
    overlap = jnp.sum(jnp.minimum(p, jnp.exp(log_q)), -1)
    if kind == "kl":
        # a banned token's logit may be -inf in both, and 0 x nan is not 0
        return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), -1), overlap
    if kind == "tv":
        return 1.0 - overlap, overlap
    # p without any mass in the draft's vocabulary teaches nothing, and log 0 would not be finite
    return -jnp.log(jnp.maximum(overlap, 1e-30)), overlap


def loss_over_depths(policy: Policy, hidden: jax.Array, states: Sequence[jax.Array],
                     head: Callable[[jax.Array], jax.Array], vocab: jax.Array | None, mask: jax.Array,
                     temperature: jax.Array, kind: str):
    """The loss of every depth against the policy's distribution at the same positions.

    Args:
      policy: its output head is read. hidden: [B, T, D], its states that predict the trained tokens.
      states: for every depth [B, T, D], what the draft's output head reads. head: states to logits [B, T, Vd].
      vocab: int32 [Vd], ids of a reduced vocabulary, or None. mask: bool [B, T]. temperature: float32 scalar or [B];
        0 counts as 1. kind: one of LOSSES.

    Returns:
      (sum over trained tokens and depths / depths, count of trained tokens float32, metrics), where the metrics are
      sums over trained tokens: "overlap" float32 [depths], the probability that the draft of that depth is accepted.
    """
    temperature = jnp.broadcast_to(jnp.where(jnp.asarray(temperature) == 0, 1.0, temperature), mask.shape[:1])
    temperature = temperature[:, None, None]

    def one(chunk):
        target, mask, *states = chunk
        log_p = jax.nn.log_softmax(logits(policy, target) / temperature)
        log_p = jax.lax.stop_gradient(log_p if vocab is None else log_p[..., vocab])
        pairs = [divergence(log_p, jax.nn.log_softmax(head(x) / temperature), kind) for x in states]
        losses, overlaps = (jnp.stack([jnp.sum(x, where=mask) for x in column]) for column in zip(*pairs, strict=True))
        return losses.mean(), jax.lax.stop_gradient(overlaps)

    total, overlap = sum_over_chunks(one, (hidden, mask, *states))
    return total, mask.sum().astype(jnp.float32), {"overlap": overlap}


def predicting(x: jax.Array, response_start: jax.Array, length: int) -> jax.Array:
    """The entries of x [B, S, D] at the positions before the `length` tokens that begin at response_start [B]."""
    at = response_start[:, None] - 1 + jnp.arange(length)[None]
    return jnp.take_along_axis(x, at[:, :, None], axis=1, mode="clip")
