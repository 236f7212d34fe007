"""What a policy minimises: for each objective a pure function from log-probabilities and advantages
to the loss of every token.

All of them are in the field's form, a loss of one token: what a token counts beside the others is
`jspec.rl.aggregation`'s, where advantages come from is `jspec.rl.advantages`'s, and the KL and the
entropy are added by `jspec.rl.losses`. `jspec.choices.OBJECTIVES` has what each goes with where a
config does not say. Below, r is the ratio of a token's probability under the policy to that under
the one that sampled it, A its advantage, n the tokens of its answer, and `sg` stops gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec import user_code
from jspec.choices import OBJECTIVES
from jspec.errors import InputError

FARTHEST = 20.0
"""A log-ratio counts as no farther from 0: what overflows has no gradient that is a number."""


@struct.dataclass
class Tokens:
    """What an objective is given: whole answers, N of them, as of a micro-batch.

    Attributes:
      logprobs: float32 [N, T], of the tokens, from the policy: what gradients are taken of.
      log_ratio: float32 [N, T], `logprobs` less those of the policy that sampled; 0 outside of the
        mask.
      advantages: float32 [N, 1] or [N, T].
      mask: bool [N, T], the tokens that are trained.
    """

    logprobs: jax.Array
    log_ratio: jax.Array
    advantages: jax.Array
    mask: jax.Array

    def over_answers(self, x: jax.Array) -> jax.Array:
        """Sums over the trained tokens of each answer, [N, 1]."""
        return jnp.sum(x, axis=1, keepdims=True, where=self.mask)

    def answer_means(self, x: jax.Array) -> jax.Array:
        """Means over the trained tokens of each answer, [N, 1]; 0 where there are none."""
        count = jnp.sum(self.mask, axis=1, keepdims=True, dtype=x.dtype)
        return self.over_answers(x) / jnp.maximum(count, 1.0)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What bounds a ratio; `jspec.learning_sections.GrpoSection` says what each means."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    sapo_tau: tuple[float, ...] = (1.0, 1.05)


Loss = tuple[jax.Array, jax.Array]
"""(loss of each token, the log-ratio that was bounded), each [N, T] or [N, 1]."""
Objective = Callable[[Tokens, Limits], Loss]


def ratio(log_ratio: jax.Array) -> jax.Array:
    """r, within what a float holds."""
    return jnp.exp(jnp.clip(log_ratio, -FARTHEST, FARTHEST))


def clipped(log_ratio: jax.Array, advantages: jax.Array, limits: Limits) -> jax.Array:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO's surrogate (arXiv:1707.06347), the
    two sides of the clip apart (DAPO, arXiv:2503.14476).

    With `dual_clip` c, which is above 1, max(that surrogate, c A) where A < 0: dual clip
    (arXiv:1912.09729), so that no ratio makes a loss larger than c |A|.
    """
    free = ratio(log_ratio) * advantages
    bound = jnp.clip(ratio(log_ratio), 1.0 - limits.clip_low, 1.0 + limits.clip_high) * advantages
    surrogate = jnp.minimum(free, bound)
    if limits.dual_clip is not None:
        least = jnp.maximum(surrogate, limits.dual_clip * advantages)
        surrogate = jnp.where(advantages < 0, least, surrogate)
    return -surrogate


def grpo(tokens: Tokens, limits: Limits) -> Loss:
    """GRPO (arXiv:2402.03300): `clipped` of each token's ratio, the advantage the answer's.

    Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476) and REINFORCE++ (arXiv:2501.03262), without
    and with its baseline, have the same loss of a token: they differ in advantages and aggregation.
    """
    return clipped(tokens.log_ratio, tokens.advantages, limits), tokens.log_ratio


def gspo(tokens: Tokens, limits: Limits) -> Loss:
    """GSPO (arXiv:2507.18071): `clipped` of one ratio for an answer,

        s = exp(1/n sum_t log r_t),

    the geometric mean of its tokens' ratios, through all of which gradients go. It is much nearer
    to 1 than a token's ratio; the paper clips at 3e-4 and 4e-4.
    """
    log_ratio = tokens.answer_means(tokens.log_ratio)
    return clipped(log_ratio, tokens.advantages, limits), log_ratio


def gspo_token(tokens: Tokens, limits: Limits) -> Loss:
    """GSPO's token form (arXiv:2507.18071, 4.3): `clipped` of

        s_t = sg(s) pi(y_t) / sg(pi(y_t)),

    whose value is GSPO's s, and whose gradient is the token's own. With one advantage for all
    tokens of an answer its gradient is GSPO's; it is there for advantages by token.
    """
    whole = jax.lax.stop_gradient(tokens.answer_means(tokens.log_ratio))
    log_ratio = whole + (tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs))
    return clipped(log_ratio, tokens.advantages, limits), log_ratio


def cispo(tokens: Tokens, limits: Limits) -> Loss:
    """CISPO (arXiv:2506.13585): the ratio's clip bounds what a token counts, and no token loses its
    gradient,

        -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi(y_t).

    The paper bounds from above alone, which is clip_low=1.
    """
    bound = jnp.clip(ratio(tokens.log_ratio), 1.0 - limits.clip_low, 1.0 + limits.clip_high)
    return -jax.lax.stop_gradient(bound) * tokens.advantages * tokens.logprobs, tokens.log_ratio


def rloo(tokens: Tokens, limits: Limits) -> Loss:
    """RLOO (arXiv:2402.14740): the answer is one action, whose probability is the product of its
    tokens',

        `clipped` of R = exp(sum_t log r_t),

    with the mean reward of its siblings as baseline (`advantage: leave_one_out`). On the first
    update R is 1, and the gradient that of REINFORCE, A grad log pi(y).
    """
    log_ratio = tokens.over_answers(tokens.log_ratio)
    return clipped(log_ratio, tokens.advantages, limits), log_ratio


def sapo(tokens: Tokens, limits: Limits) -> Loss:
    """SAPO (arXiv:2511.20347): a soft gate in the place of the clip,

        -A 4/tau sigmoid(tau (r - 1)),

    with tau one number for A > 0 and another, larger one for the rest, whose gradients the gate
    then lets fade faster (`sapo_tau`). Its gradient at r = 1 is that of r A.
    """
    above, below = limits.sapo_tau
    tau = jnp.where(tokens.advantages > 0, above, below).astype(tokens.log_ratio.dtype)
    gate = jax.nn.sigmoid(tau * (ratio(tokens.log_ratio) - 1.0))
    return -tokens.advantages * 4.0 / tau * gate, tokens.log_ratio


_OWN: dict[str, Objective] = {
    "grpo": grpo, "dr_grpo": grpo, "dapo": grpo, "reinforce_plus_plus": grpo,
    "reinforce_plus_plus_baseline": grpo, "gspo": gspo, "gspo_token": gspo_token, "cispo": cispo,
    "rloo": rloo, "sapo": sapo}
assert _OWN.keys() == OBJECTIVES.keys()


def find(name: str) -> Objective:
    """The objective of a name: one of `jspec.choices.OBJECTIVES`, or a user's function,
    `path/to/file.py:NAME`, whose file is run: it takes what the others take, and returns what they
    return, or the loss of each token alone.

    Raises InputError if there is no such function, or what it makes of two answers of three tokens
    is no loss of each.
    """
    if name in _OWN:
        return _OWN[name]
    label = f"grpo.objective={name}"
    function = user_code.load(label, name, "function", callable)
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    tokens = Tokens(shape, shape, jax.ShapeDtypeStruct((2, 1), jnp.float32),
                    jax.ShapeDtypeStruct((2, 3), jnp.bool_))

    def losses(tokens: Tokens) -> Any:
        return function(tokens, Limits())

    try:
        made = jax.eval_shape(losses, tokens)
    except (Exception, SystemExit) as error:  # anything may go wrong in a function of the user's
        raise InputError(f"{label}: it raises {user_code.one_line(error)}") from error
    each = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(each) <= 2 or not all(
            isinstance(x, jax.ShapeDtypeStruct) and x.shape in ((2, 3), (2, 1))
            and jnp.issubdtype(x.dtype, jnp.floating) for x in each):
        raise InputError(f"{label}: it must return the loss of each token, of the log-ratios' "
                         f"shape and a floating dtype, not {made} for those of shape (2, 3)")
    return function


def loss_of(objective: Objective, tokens: Tokens, limits: Limits) -> Loss:
    """The loss of each token and the log-ratio that was bounded, both [N, T], 0 outside of the
    mask."""
    made = objective(tokens, limits)
    both = made if isinstance(made, tuple) else (made, tokens.log_ratio)

    def of_tokens(x: jax.Array) -> jax.Array:
        return jnp.where(tokens.mask, jnp.broadcast_to(x, tokens.mask.shape), 0.0)

    return of_tokens(both[0]), of_tokens(both[-1] if len(both) == 2 else tokens.log_ratio)
