"""The losses of the update, as pure functions of hidden states: nothing here knows how they were
computed.

The papers: GRPO (https://arxiv.org/abs/2402.03300), DAPO's token-level mean and separate clips
(https://arxiv.org/abs/2503.14476), Dr. GRPO (https://arxiv.org/abs/2503.20783), and J. Schulman's
note on approximating KL divergence for the k3 estimator (http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jspec.model import Policy, logits
from jspec.model.chunks import CHUNK_TOKENS, map_chunks
from pallas_kernels.rejection_sampling import scaled


def predicting(last: jax.Array, of_responses: jax.Array) -> jax.Array:
    """What belongs to the states that predict the responses' tokens, [N, T, ...]: each token's is
    that of the token before it.

    last: [N, ...], at the last tokens of their prompts. of_responses: [N, T, ...].
    """
    return jnp.concatenate([last[:, None], of_responses[:, :-1]], axis=1)


def token_logprobs(policy: Policy, hidden: jax.Array, tokens: jax.Array, temperature: jax.Array,
                   chunk_tokens: int = CHUNK_TOKENS) -> tuple[jax.Array, jax.Array]:
    """Log-probability of `tokens` and entropy of what they were drawn from, the output head applied
    in chunks.

    Logits [N, T, V] never exist at once, neither forward nor backward: see `model.chunks`.

    Args:
      hidden: [N, T, D], final-normed, the states that predict `tokens`.
      tokens: int32 [N, T].
      temperature: float32 scalar or [N]; 0 counts as 1, as in the rollout.

    Returns:
      (logprobs, entropy), float32 [N, T], of softmax(logits / temperature) over the whole
      vocabulary. The entropy carries no gradient.
    """
    n, t, _ = hidden.shape
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (n,))[:, None]

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, tokens = chunk
        z = scaled(logits(policy, hidden), temperature)
        normaliser = jnp.log(jnp.sum(jnp.exp(z), axis=-1))  # the largest z is 0
        chosen = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
        still = jax.lax.stop_gradient(z - normaliser[..., None])
        # the logit of an id without a token is -inf, and 0 x -inf is not 0
        entropy = -jnp.sum(jnp.where(jnp.isneginf(still), 0.0, jnp.exp(still) * still), axis=-1)
        return chosen - normaliser, entropy

    with jax.named_scope("token_logprobs"):
        out = map_chunks(of_chunk, (hidden, tokens), chunk_tokens)
        return tuple(x.swapaxes(0, 1).reshape(n, -1)[:, :t] for x in out)


def clipped_objective(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array,
                      mask: jax.Array,
                      clip_low: float, clip_high: float) -> tuple[jax.Array, jax.Array]:
    """The clipped surrogate of every token, to be maximised, and where the clip is what decides.

    min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprobs - old_logprobs): PPO's
    surrogate with a group-relative advantage (GRPO), and the two sides of the clip apart (DAPO).

    Args:
      logprobs, old_logprobs: float32 [N, T]; the latter are the verifier's.
      advantages: float32 [N], one for each sequence.
      mask: bool [N, T]; values elsewhere are ignored, whatever they are.

    Returns:
      (surrogate float32 [N, T], clipped bool [N, T]), 0 and False outside the mask.
    """
    ratio = jnp.exp(jnp.where(mask, logprobs - old_logprobs, 0.0))
    advantages = advantages[:, None]
    free = ratio * advantages
    bound = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    return jnp.where(mask, jnp.minimum(free, bound), 0.0), mask & (bound < free)


def outside(logprobs: jax.Array, old_logprobs: jax.Array, clip_low: float,
            clip_high: float) -> jax.Array:
    """Where the ratio of the two is outside of the clip's range, whatever the advantage. Arguments
    as in `clipped_objective`; bool [N, T], garbage outside of its mask."""
    ratio = jnp.exp(logprobs - old_logprobs)
    return (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)


LEAST_BITS, STEP_BITS, BINS = -24, 4, 512
"""Bins of a histogram of gaps: 2**STEP_BITS to an octave, from 2**LEAST_BITS on."""


def histogram(gaps: jax.Array, mask: jax.Array) -> jax.Array:
    """How many gaps, float32 [...] >= 0 and where `mask` is true, are in each of log-spaced bins:
    int32 [BINS], which those of other tokens can be added to. The first bin holds whatever is
    smaller than the others, and the last what is larger, or no number."""
    # a float's upper bits grow with its logarithm
    bits = jax.lax.bitcast_convert_type(gaps, jnp.int32) >> (23 - STEP_BITS)
    bins = jnp.clip(bits - ((LEAST_BITS + 127) << STEP_BITS) + 1, 0, BINS - 1)
    return jnp.zeros(BINS, jnp.int32).at[bins].add(mask.astype(jnp.int32))


def quantiles(counts: jax.Array, most: jax.Array, shares: Sequence[float]) -> jax.Array:
    """For each share what that share of the gaps of a `histogram` is not above, float32 [shares],
    to the next bin's edge, which is at most 1/16 above it; most: their maximum, float32."""
    up_to = jnp.cumsum(counts)
    needed = jnp.ceil(jnp.asarray(shares, jnp.float32) * up_to[-1].astype(jnp.float32))
    bins = jnp.searchsorted(up_to, jnp.maximum(needed, 1.0).astype(jnp.int32))
    edges = (bins.astype(jnp.int32) + ((LEAST_BITS + 127) << STEP_BITS)) << (23 - STEP_BITS)
    edges = jax.lax.bitcast_convert_type(edges, jnp.float32)
    return jnp.minimum(jnp.where(bins < BINS - 1, edges, jnp.inf), most)


def k3(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference) for each token, float32 [N, T], 0 outside
    the mask.

    exp(d) - d - 1 with d = reference - policy at the sampled token: unbiased, and never negative.
    """
    d = jnp.where(mask, reference_logprobs - logprobs, 0.0)
    return jnp.exp(d) - d - 1.0
