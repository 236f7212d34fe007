"""The one signature of every implementation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.implementation import REFERENCE, Implementation
from pallas_kernels.noise import CoupledNoise, Noise
from pallas_kernels.rejection_sampling import processing, reference
from pallas_kernels.rejection_sampling.verdict import inverse_transform, judge


@struct.dataclass
class Verdict:
    """What one cycle decided.

    Attributes:
      accepted: int32 [B], drafted tokens accepted, 0..K.
      tokens: int32 [B, K + 1]; the first accepted + 1 are emitted, what follows is garbage.
      logprobs: float32 [B, K + 1], log-softmax(logits / T) of each of `tokens`, over the whole
        vocabulary, with no truncation and no bans; at T = 0 with T = 1.
      entropy: float32 [B, K + 1], nats, of that same distribution at each position.
      behaviour_logprobs: float32 [B, K + 1], log p of each of `tokens`, p being what is sampled
        from (`process_logits`), 0 at T = 0; None without top_k, top_p and min_p.
    """

    accepted: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    entropy: jax.Array
    behaviour_logprobs: jax.Array | None = None


def process_logits(logits: jax.Array, temperature: jax.Array, top_p: jax.Array | None = None, *,
                   top_k: int = 0, min_p: jax.Array | None = None,
                   ban: jax.Array | None = None, banned_tokens: tuple[int, ...] = ()) -> jax.Array:
    """Log-probabilities, float32 [..., V], of what is sampled from: ban, temperature, top-k, top-p,
    min-p, normalised after each.

    Args:
      logits: [..., V], any float dtype.
      temperature: broadcasts to [...]; 0 gives all mass to the largest logit (ties: the lowest id).
        What is smaller than float32's normal numbers, 1.2e-38, is 0.
      top_p: broadcasts to [...], or None for no truncation. The token that crosses is kept; ties go
        to the lowest id.
      top_k: static; 0 is off.
      min_p: broadcasts to [...], or None; tokens less than min_p times as likely as the likeliest
        one are cut off (https://arxiv.org/abs/2407.01082).
      ban: bool [...], where true `banned_tokens` have probability zero.
    """
    return processing.process_logits(logits, temperature, top_p, top_k=top_k, min_p=min_p,
                                    ban=ban, banned_tokens=banned_tokens)


def draw(log_q: jax.Array, noise: Noise, offset: int, draft_vocab: jax.Array | None = None,
         axis: tuple[str, ...] | None = None) -> jax.Array:
    """Draw draft token `offset` of the block, int32 [B], from normalised log-probabilities float32
    [B, V].

    Under `CoupledNoise` this is the target's own Gumbel noise at that position; under the others it
    is noise that no later judgement looks at. draft_vocab: int32 [V], the global ids of a reduced
    vocabulary; None: they are 0..V-1. axis: inside `shard_map`, and of a whole vocabulary, the mesh
    axes that share it; log_q is then this device's part. Not under `CoupledNoise`, whose argmax XLA
    partitions by itself.
    """
    if axis is not None:
        assert not isinstance(noise, CoupledNoise)
        return inverse_transform(jnp.exp(log_q), noise.draft[:, offset], axis)
    return reference.draw(log_q, noise, offset, draft_vocab)


def rejection_sampling(logits: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
                       noise: Noise, temperature: jax.Array, top_p: jax.Array | None = None, *,
                       draft_vocab: jax.Array | None = None, top_k: int = 0,
                       min_p: jax.Array | None = None, ban: jax.Array | None = None,
                       banned_tokens: tuple[int, ...] = (),
                       implementation: Implementation = REFERENCE,
                       axis: tuple[str, ...] | None = None) -> Verdict:
    """Judge K drafted tokens a row, without changing the distribution of what is emitted.

    With p the processed target (`process_logits`), and the kind of the noise naming the rule:

    - `RejectionNoise` (https://arxiv.org/abs/2211.17192, https://arxiv.org/abs/2302.01318): accept
      draft y iff log u < log p(y) - log q(y), strictly; at the first refusal draw from the
      normalised (p - q)+; after K acceptances from p. Deterministic drafts are q = 1 on their
      token.
    - `BlockNoise` (https://arxiv.org/abs/2403.10444): with w_0 = 1, w_i = min(1, w_{i-1} p(y_i) /
      q(y_i)) and r_i the mass of (w_i p - q)+ over the token after the first i drafts, accept as
      many as the last i with u < h_i, where h_i = r_i / (r_i + 1 - w_i) and h_K = w_K; then draw
      from the normalised (w_i p - q)+; after K acceptances from p. In expectation never fewer than
      rejection accepts, and exact only with noise that is fresh in every cycle.
    - `CoupledNoise`: the target's token is argmax(log p + g) with g fixed by the position; accept
      iff the draft is it.

    Args:
      logits: [B, K + 1, V], float32 or bfloat16; row j judges draft j, row K gives the bonus token.
      draft_tokens: int32 [B, K].
      draft_log_q: float32 [B, K, Vd], the normalised log-probabilities that the drafts were drawn
        from, or None for deterministic drafts. Of a row that is NaN the draft is refused, and q is
        0: what is emitted there is from p.
      temperature: float32 [B]; 0, and what is below float32's normal numbers, is greedy.
      top_p, min_p: float32 [B] or None. top_k: static, 0 is off. With any of them the reference
        runs: two of them sort.
      draft_vocab: int32 [Vd], distinct global ids of a reduced draft vocabulary, outside of which q
        is 0; None: Vd = V.
      ban: bool [B, K + 1] or None; where true `banned_tokens` have probability zero in p.
      implementation: the kernels read the logits once, and with sampled drafts one row a sequence
        again; `BlockNoise` needs the K rows of sampled drafts again, whose weights depend on the
        rows before.
      axis: for a kernel inside `shard_map`, the mesh axes that share the vocabulary: logits (and
        draft_log_q, where there is no draft_vocab) are then this device's V consecutive ids of it.

    Raises NotImplementedError where the kernel does not take these shapes, and for `axis` where the
    reference runs.
    """
    if implementation.name == "reference" or processing.is_cut(top_k, top_p, min_p):
        if axis is not None:
            raise NotImplementedError("the reference judges a whole vocabulary, not a shard of it: "
                                      "leave out axis, and XLA partitions it")
        return Verdict(*reference.rejection_sampling(
            logits, draft_tokens, draft_log_q, noise, temperature, top_p,
            draft_vocab=draft_vocab, top_k=top_k, min_p=min_p, ban=ban,
            banned_tokens=banned_tokens))
    temperature = processing.flushed(temperature)
    summarize = partial(implementation.load(__package__).summarize,
                        interpret=implementation.interpret)
    return Verdict(*judge(summarize, logits, draft_tokens, draft_log_q, noise, temperature,
                          draft_vocab, ban, banned_tokens, axis))
