"""The losses of the update, as pure functions of hidden states: nothing here knows how they were
computed.

The papers: GRPO (https://arxiv.org/abs/2402.03300), DAPO's token-level mean and separate clips
(https://arxiv.org/abs/2503.14476), Dr. GRPO (https://arxiv.org/abs/2503.20783), and J. Schulman's
note on approximating KL divergence for the k3 estimator (http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jspec.model import Policy, logits
from jspec.model.chunks import CHUNK_TOKENS, map_chunks
from pallas_kernels.rejection_sampling import scaled


def predicting_states(last: jax.Array, response_hidden: jax.Array) -> jax.Array:
    """The hidden states that predict the responses' tokens, [N, T, D]: each token's is that of the
    token before it.

    last: [N, D], at the last tokens of their prompts. response_hidden: [N, T, D].
    """
    return jnp.concatenate([last[:, None], response_hidden[:, :-1]], axis=1)


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


def k3(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference) for each token, float32 [N, T], 0 outside
    the mask.

    exp(d) - d - 1 with d = reference - policy at the sampled token: unbiased, and never negative.
    """
    d = jnp.where(mask, reference_logprobs - logprobs, 0.0)
    return jnp.exp(d) - d - 1.0
