"""What a draft is trained on: how far its distribution is from the policy's, at the sampling
temperature.

Per position, with p the policy's distribution and q the draft's, both at that temperature, and the
overlap sum(min(p, q)) the probability that a draft from q is accepted
(https://arxiv.org/abs/2211.17192):

- `kl`: forward KL, sum(p log(p / q)).
- `tv`: total variation, 1 - overlap (https://arxiv.org/abs/2310.08461).
- `overlap`: -log overlap, the negative log-likelihood of acceptance.
- `ce`: cross-entropy with the token that the policy likes best, as DFlash is published.
- `ce_tv`: 0.1 `ce` + 0.9 `tv`, as DSpark is (https://arxiv.org/abs/2607.05147).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from jspec.drafts.base import DraftBatch, Metrics
from jspec.drafts.parts.vocabulary import head_rows, output_table, table_logits
from jspec.model import Policy, logits
from jspec.model.chunks import CHUNK_TOKENS, sum_over_chunks
from pallas_kernels.rejection_sampling import divisor, scaled_logprobs


def divergence(log_p: jax.Array, log_q: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """(loss, overlap), float32 [...], of log p and log q float32 [..., V] over the draft's
    vocabulary.

    q sums to 1 over it; p need not: what it has outside is beyond the draft's reach, and counts as
    no overlap.
    """
    p = jnp.exp(log_p)
    overlap = jnp.sum(jnp.minimum(p, jnp.exp(log_q)), -1)
    if kind == "kl":
        # a banned token's logit may be -inf in both, and 0 x nan is not 0
        return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), -1), overlap
    if kind == "tv":
        return 1.0 - overlap, overlap
    if kind in ("ce", "ce_tv"):
        best = jnp.argmax(log_p, axis=-1)[..., None]
        entropy = -jnp.take_along_axis(log_q, best, axis=-1)[..., 0]
        return (entropy if kind == "ce" else 0.1 * entropy + 0.9 * (1.0 - overlap)), overlap
    # p without any mass in the draft's vocabulary teaches nothing, and log 0 would not be finite
    return -jnp.log(jnp.maximum(overlap, 1e-30)), overlap


def loss_over_depths(policy: Policy, batch: DraftBatch, states: Sequence[jax.Array],
                     head: Callable[[jax.Array], jax.Array], vocab: jax.Array | None,
                     kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """The loss of every depth against the policy's distribution at the same positions.

    With a reduced vocabulary the policy's output head is applied to that alone: what its
    probabilities are divided by follows from the tokens' own log-probabilities, which the policy's
    loss (or the rollout) has computed already.

    Args:
      policy: its output head is read.
      states: for every depth [B, T, D], what the draft's output head reads. head: states to logits
        [B, T, Vd].
      vocab: int32 [Vd], ids of a reduced vocabulary, or None. kind: one of `choices.DRAFT_LOSSES`.

    Returns:
      (sum over trained tokens and depths / depths, count of trained tokens float32, metrics), where
      the metrics are sums over trained tokens: "overlap" float32 [depths], the probability that the
      draft of that depth is accepted.
    """
    columns, log_target, log_draft, size = _columns(policy, batch, head, vocab)

    def sums_of(chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        *target, mask, states = chunk
        log_p = log_target(*target)
        pairs = [divergence(log_p, log_draft(x), kind) for x in states]
        losses, overlaps = (jnp.stack([jnp.sum(x, where=mask) for x in column])
                            for column in zip(*pairs, strict=True))
        return losses.mean(), jax.lax.stop_gradient(overlaps)

    total, overlap = sum_over_chunks(sums_of, (*columns, batch.mask, tuple(states)), size)
    return total, batch.mask.sum().astype(jnp.float32), {"overlap": overlap}


def loss_over_slots(policy: Policy, batch: DraftBatch, states: jax.Array, slots: int,
                    head: Callable[[jax.Array], jax.Array], vocab: jax.Array | None, kind: str,
                    decay: float, confidence: jax.Array | None = None
                    ) -> tuple[jax.Array, jax.Array, Metrics]:
    """The loss of drafts of one pass, whose slots predict one token each: T is a multiple of
    `slots`, and entry t is slot t % slots of its draft (`parts.anchored`).

    A slot's loss counts exp(-slot / decay): a draft behind a refused one is worth nothing
    (https://arxiv.org/abs/2602.06036). `confidence` float32 [B, T], logits of each draft's being
    accepted, learns 1 - total variation by binary cross-entropy, which is added
    (https://arxiv.org/abs/2607.05147). Otherwise as `loss_over_depths`, of states [B, T, D]; the
    metric "overlap" float32 [slots] is of each slot the mean over what it predicts, times the
    count.
    """
    columns, log_target, log_draft, size = _columns(policy, batch, head, vocab)
    slot = jnp.broadcast_to(jnp.arange(batch.mask.shape[1]) % slots, batch.mask.shape)
    if confidence is not None:
        columns = (*columns, confidence)

    def sums_of(chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, tokens, logprobs, *confidence, mask, slot, states = chunk
        losses, overlap = divergence(log_target(hidden, tokens, logprobs), log_draft(states), kind)
        for logit in confidence:
            losses += optax.sigmoid_binary_cross_entropy(logit, jax.lax.stop_gradient(overlap))
        losses *= jnp.exp(-slot.astype(jnp.float32) / decay)
        of_slot = (slot[..., None] == jnp.arange(slots)) & mask[..., None]
        sums = jnp.sum(overlap[..., None], axis=(0, 1), where=of_slot)
        return (jnp.sum(losses, where=mask), jax.lax.stop_gradient(sums),
                of_slot.sum((0, 1)).astype(jnp.float32))

    total, overlap, counts = sum_over_chunks(sums_of, (*columns, batch.mask, slot, states), size)
    count = batch.mask.sum().astype(jnp.float32)
    return total, count, {"overlap": overlap * count / jnp.maximum(counts, 1.0)}


def _columns(policy: Policy, batch: DraftBatch, head: Callable[[jax.Array], jax.Array],
             vocab: jax.Array | None) -> tuple[tuple[jax.Array, ...], Callable, Callable, int]:
    """What tells the policy's distribution at the trained positions, arrays [B, T, ...]; functions
    of such columns to log p, and of what the draft's head reads to log q, [B, T, Vd]; and how many
    tokens are computed at a time."""
    temperature = jnp.broadcast_to(jnp.asarray(batch.temperature, jnp.float32),
                                   batch.mask.shape[:1])[:, None]
    table = None if vocab is None else output_table(policy, vocab)

    def log_target(hidden, tokens, logprobs) -> jax.Array:
        if vocab is None:
            return scaled_logprobs(logits(policy, hidden), temperature)
        own = jnp.einsum("btd,btd->bt", hidden, head_rows(policy, tokens),
                         precision=jax.lax.Precision.HIGHEST,
                         preferred_element_type=jnp.float32)[..., None]
        above = (table_logits(policy, table, vocab, hidden) - own) / divisor(temperature)[..., None]
        # at most 0 but for rounding, and but for positions that are not trained, whose gradients
        # must stay finite
        return jnp.minimum(above + logprobs[..., None], 0.0)

    def log_draft(states: jax.Array) -> jax.Array:
        return scaled_logprobs(head(states), temperature)

    # of padding -inf, where no token has its id
    logprobs = jnp.where(batch.mask, batch.logprobs, 0.0)
    columns = (batch.predicting(batch.trunk.hidden), batch.response(), logprobs)
    # as many logits at a time as of the whole vocabulary: of a reduced one often all, and none is
    # computed twice
    size = policy.config.vocab_size if vocab is None else len(vocab)
    return (columns, lambda *column: jax.lax.stop_gradient(log_target(*column)), log_draft,
            CHUNK_TOKENS * policy.config.vocab_size // size)


def unit(x: jax.Array) -> jax.Array:
    """x [..., D] at a root mean square of 1, as `rms_norm` without a scale makes it."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)


def state_loss(policy: Policy, batch: DraftBatch,
               states: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, Metrics]:
    """Mean squared distance of the draft's states from the policy's at the same positions, both at
    unit size.

    It costs no output head, and leads most of the way (https://arxiv.org/abs/2401.15077). states:
    for every depth [B, T, D], scaled as the policy's final norm scales. Returns as
    `loss_over_depths` does, without metrics.
    """
    scale = policy.weights["final_norm"].astype(jnp.float32)
    target = unit(batch.predicting(batch.trunk.hidden).astype(jnp.float32) / scale)
    losses = [jnp.sum(jnp.mean(jnp.square(x.astype(jnp.float32) / scale - target), -1),
                      where=batch.mask) for x in states]
    count = batch.mask.sum().astype(jnp.float32)
    return jnp.stack(losses).mean(), count, {}
