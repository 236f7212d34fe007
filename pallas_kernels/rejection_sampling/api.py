"""The one signature of every implementation."""

from __future__ import annotations

import jax
from flax import struct

from pallas_kernels.noise import CoupledNoise, RejectionNoise
from pallas_kernels.rejection_sampling import reference


@struct.dataclass
class Verdict:
    """What one cycle decided.

    Attributes:
      accepted: int32 [B], drafted tokens accepted, 0..K.
      tokens: int32 [B, K + 1]; the first accepted + 1 are emitted, what follows is garbage.
      logprobs: float32 [B, K + 1], log-softmax(logits / T) of each of `tokens`, over the whole vocabulary, with no
        truncation and no bans; at T = 0 with T = 1.
      entropy: float32 [B, K + 1], nats, of that same distribution at each position.
    """

    accepted: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    entropy: jax.Array


def process_logits(logits: jax.Array, temperature: jax.Array, top_p: jax.Array | None = None, *, top_k: int = 0,
                   ban: jax.Array | None = None, banned_tokens: tuple[int, ...] = ()) -> jax.Array:
    """Log-probabilities, float32 [..., V], of what is sampled from: ban, temperature, top-k, top-p, normalised.

    Args:
      logits: [..., V], any float dtype.
      temperature: broadcasts to [...]; 0 gives all mass to the largest logit (ties: the lowest id).
      top_p: broadcasts to [...], or None for no truncation. The token that crosses is kept; ties go to the lowest id.
      top_k: static; 0 is off.
      ban: bool [...], where true `banned_tokens` have probability zero.
    """
    return reference.process_logits(logits, temperature, top_p, top_k=top_k, ban=ban, banned_tokens=banned_tokens)


def draw(log_q: jax.Array, noise: RejectionNoise | CoupledNoise, offset: int) -> jax.Array:
    """Draw draft token `offset` of the block, int32 [B], from normalised log-probabilities float32 [B, V].

    Under `CoupledNoise` this is the target's own Gumbel noise at that position; under `RejectionNoise` it is noise that
    no later judgement looks at.
    """
    return reference.draw(log_q, noise, offset)


def rejection_sampling(logits: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
                       noise: RejectionNoise | CoupledNoise, temperature: jax.Array, top_p: jax.Array | None = None, *,
                       top_k: int = 0, ban: jax.Array | None = None, banned_tokens: tuple[int, ...] = ()) -> Verdict:
    """Judge K drafted tokens a row, without changing the distribution of what is emitted.

    With p the processed target (`process_logits`), and the kind of the noise naming the rule:

    - `RejectionNoise` (https://arxiv.org/abs/2211.17192, https://arxiv.org/abs/2302.01318): accept draft y iff
      log u < log p(y) - log q(y), strictly; at the first refusal draw from the normalised (p - q)+; after K acceptances
      from p. Deterministic drafts are q = 1 on their token.
    - `CoupledNoise`: the target's token is argmax(log p + g) with g fixed by the position; accept iff the draft is it.

    Args:
      logits: [B, K + 1, V], float32 or bfloat16; row j judges draft j, row K gives the bonus token.
      draft_tokens: int32 [B, K].
      draft_log_q: float32 [B, K, V], the normalised log-probabilities that the drafts were drawn from, or None for
        deterministic drafts.
      temperature: float32 [B]; 0 is greedy.
      top_p: float32 [B] or None. top_k: static, 0 is off.
      ban: bool [B, K + 1] or None; where true `banned_tokens` have probability zero in p.
    """
    return Verdict(*reference.rejection_sampling(logits, draft_tokens, draft_log_q, noise, temperature, top_p,
                                                 top_k=top_k, ban=ban, banned_tokens=banned_tokens))
