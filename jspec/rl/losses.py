"""The losses of the update, as pure functions of hidden states: nothing here knows how they were
computed.

The objectives' papers stand in `jspec.rl.objectives`; J. Schulman's note on approximating the KL
divergence is http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jspec.model import Policy, logits
from jspec.model.chunks import CHUNK_TOKENS, map_chunks
from jspec.rl.aggregation import Totals
from jspec.rl.batch import TrainBatch
from jspec.rl.corrections import correction
from jspec.rl.objectives import Tokens, loss_of, ratio
from jspec.rl.update_settings import Cut, UpdateSettings
from pallas_kernels.rejection_sampling import scaled


def predicting(last: jax.Array, of_responses: jax.Array) -> jax.Array:
    """What belongs to the states that predict the responses' tokens, [N, T, ...]: each token's is
    that of the token before it.

    last: [N, ...], at the last tokens of their prompts. of_responses: [N, T, ...].
    """
    return jnp.concatenate([last[:, None], of_responses[:, :-1]], axis=1)


def token_logprobs(policy: Policy, hidden: jax.Array, tokens: jax.Array, temperature: jax.Array,
                   chunk_tokens: int = CHUNK_TOKENS, through_entropy: bool = False,
                   cut: Cut | None = None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-probability of `tokens` and entropy of the policy, the output head applied in chunks.

    Logits [N, T, V] never exist at once, neither forward nor backward: see `model.chunks`.

    Args:
      hidden: [N, T, D], final-normed, the states that predict `tokens`.
      tokens: int32 [N, T].
      temperature: float32 scalar or [N]; 0 counts as 1, as in the rollout.
      through_entropy: whether the entropy carries a gradient.
      cut: what tokens are drawn with, if unlikely ones are cut off.

    Returns:
      (logprobs, entropy), float32 [N, T], of softmax(logits / temperature) over the whole
      vocabulary, and with `cut` the log-probabilities under what is left of it, normalised: -inf of
      a token that is cut off. Which ones are left carries no gradient.
    """
    n, t, _ = hidden.shape
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (n,))[:, None]

    def of_chunk(chunk: tuple[jax.Array, jax.Array]
                 ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        hidden, tokens = chunk
        scores = logits(policy, hidden)
        z = scaled(scores, temperature)
        normaliser = jnp.log(jnp.sum(jnp.exp(z), axis=-1))  # the largest z is 0
        chosen = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
        each = z - normaliser[..., None]
        each = each if through_entropy else jax.lax.stop_gradient(each)
        # the logit of an id without a token is -inf, and 0 x -inf is not 0
        there = jnp.where(jnp.isneginf(each), 0.0, each)
        entropy = -jnp.sum(jnp.where(jnp.isneginf(each), 0.0, jnp.exp(each) * there), axis=-1)
        behaviour = None if cut is None else left(z, cut.kept(scores, temperature), tokens)
        return chosen - normaliser, entropy, behaviour

    with jax.named_scope("token_logprobs"):
        out = map_chunks(of_chunk, (hidden, tokens), chunk_tokens)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(n, -1)[:, :t], out)


def left(z: jax.Array, kept: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities of tokens int32 [...] under softmax(z) of the ids that are kept, float32
    and bool [..., V]; the largest z is 0, and kept."""
    z = jnp.where(kept, z, -jnp.inf)
    chosen = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
    return chosen - jnp.log(jnp.sum(jnp.exp(z), axis=-1))


def answer_loss(logprobs: jax.Array, entropy: jax.Array, anchored: jax.Array | None,
                rows: TrainBatch, totals: Totals, settings: UpdateSettings,
                behaviour: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of some answers as a function of their tokens' log-probabilities: the objective, the
    KL to the reference and the entropy, each token counted with its row's share.

    Args:
      logprobs, entropy: float32 [N, T], the policy's. Outside of the rows' mask whatever they are.
      anchored: float32 [N, T], the reference's; None: there is no KL in the loss.
      rows: answers, whole, with `shares` and `advantages`.
      behaviour: float32 [N, T], the policy's `logprobs` where unlikely tokens are cut off, as they
        were when the rows were drawn; the objective is then of these. None: of `logprobs`.

    Returns (loss, metrics `loss`, `clip_fraction`, `clip_fraction/low`, `clip_fraction/high` and,
    with a KL, `kl`): float32 scalars that are sums over rows, so that those of micro-batches add up
    to the update's.
    """
    advantages = rows.advantages.reshape(rows.mask.shape[0], -1)
    drawn, before, mask = logprobs, rows.logprobs, rows.mask
    if behaviour is not None:  # a token that the policy cuts off by now has no gradient
        mask = mask & (behaviour > -jnp.inf)
        drawn, before = jnp.where(mask, behaviour, 0.0), rows.behaviour_logprobs
    weights, about = jnp.ones((), jnp.float32), {}
    if settings.correction != "none":
        own = jax.lax.stop_gradient(drawn) if rows.own_logprobs is None else rows.own_logprobs
        mask = mask & (own > -jnp.inf)  # the update's own cut may have been another, by rounding
        own = jnp.where(mask, own, 0.0)
        weights, about = correction(own - before, mask, settings.correction,
                                    *settings.correction_bounds)
        before = own
    log_ratio = jnp.where(mask, drawn - before, 0.0)
    each, bounded = loss_of(settings.objective, Tokens(drawn, log_ratio, advantages, mask),
                            settings)
    each = jnp.where(mask, weights * each, 0.0)  # not the KL's

    def summed(x: jax.Array) -> jax.Array:
        return jnp.sum(rows.shares[:, None] * x, where=rows.mask, dtype=jnp.float32) / totals.shares

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x, where=rows.mask, dtype=jnp.float32) / totals.tokens

    loss = summed(each)
    low = (ratio(bounded) < 1.0 - settings.clip_low) & (advantages < 0)
    high = (ratio(bounded) > 1.0 + settings.clip_high) & (advantages > 0)
    metrics = {"clip_fraction": mean(low | high), "clip_fraction/low": mean(low),
               "clip_fraction/high": mean(high)}
    metrics |= {name: mean(x) for name, x in about.items()}
    if rows.behaviour_logprobs is not None:
        metrics["kept_mass"] = mean(jnp.exp(rows.logprobs - rows.behaviour_logprobs))
    if behaviour is not None:
        metrics["cut_flip_rate"] = mean(rows.mask & ~mask)
    if anchored is not None:
        kl = kl_estimate(logprobs, jax.lax.stop_gradient(anchored), rows.mask,
                         settings.kl_estimate)
        metrics["kl"] = mean(kl)
        loss = loss + settings.kl_weight * summed(kl)
    if settings.entropy_weight:
        loss = loss - settings.entropy_weight * summed(entropy)
    return loss, {**metrics, "loss": loss}


def outside(logprobs: jax.Array, old_logprobs: jax.Array, clip_low: float,
            clip_high: float) -> jax.Array:
    """Where the ratio of the two, float32 [N, T], is outside of the clip's range, whatever the
    advantage: bool [N, T]."""
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


def kl_estimate(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array,
                estimate: str) -> jax.Array:
    """J. Schulman's estimates of KL(policy || reference) from each sampled token, float32 [N, T],
    0 outside the mask. With d = reference - policy, of their log-probabilities:

    - `k1`, -d: unbiased, of either sign. Its gradient in a loss is 0 in the mean: for the reward.
    - `k2`, d^2 / 2: biased, never negative; its gradient in a loss is that of the KL.
    - `k3`, exp(d) - d - 1: unbiased, never negative.
    """
    d = jnp.where(mask, reference_logprobs - logprobs, 0.0)
    if estimate == "k1":
        return -d
    return jnp.square(d) / 2.0 if estimate == "k2" else jnp.exp(d) - d - 1.0
