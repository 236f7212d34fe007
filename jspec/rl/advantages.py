"""From rewards to advantages: each answer is compared with the others that its own prompt got, or
that the step got."""

import jax
import jax.numpy as jnp

from jspec.choices import ADVANTAGES, AdvantageForm

EPSILON = 1e-6
"""Added to a standard deviation. It only guards the division: rewards without spread are set to
zero anyway."""


def advantages_of(rewards: jax.Array, mask: jax.Array, group_size: int,
                  form: AdvantageForm) -> jax.Array:
    """Advantages of N = prompts x group_size answers; row i belongs to prompt i // group_size.

    `whitened` is REINFORCE++'s (arXiv:2501.03262): `(r - mean) / (std + EPSILON)` over all trained
    tokens of all answers, each with its answer's reward, so that long answers weigh more;
    `whitened_baseline` that of `group_advantages(..., "dr_grpo")`. The others are those of
    `group_advantages`, which do not look at the mask.

    Args:
      rewards: float [N]; of `whitened` also [N, T], by token.
      mask: bool [N, T], the tokens that are trained.
      group_size, form: static.

    Returns:
      float32, shaped as the rewards.

    Raises:
      ValueError: N is not a multiple of group_size, or the form is unknown.
    """
    if form == "whitened":
        return whitened(rewards, mask)
    if form == "whitened_baseline":
        return whitened(group_advantages(rewards, group_size, "dr_grpo"), mask)
    return group_advantages(rewards, group_size, form)


def group_advantages(rewards: jax.Array, group_size: int,
                     form: AdvantageForm = "group") -> jax.Array:
    """Advantages within groups.

    `group` is GRPO's (arXiv:2402.03300): `(r - mean) / (std + EPSILON)` with the mean and the
    population standard deviation of the row's own group. `dr_grpo` is Dr. GRPO's
    (arXiv:2503.20783): `r - mean`, which does not weigh up the groups whose answers hardly differ.
    `leave_one_out` is RLOO's (arXiv:2402.14740): `r` less the mean of the group's other rewards.
    A group whose rewards are all equal gets exactly zero in all of them.

    Args:
        rewards: float [N].
        group_size: answers a prompt, static.
        form: which of them, static.

    Returns:
        float32 [N].

    Raises:
        ValueError: N is not a multiple of group_size, or the form is unknown.
    """
    forms = [known for known in ADVANTAGES if not known.startswith("whitened")]
    if form not in forms:
        raise ValueError(f"advantage form {form!r} is none of a group's: {', '.join(forms)}")
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards of shape {rewards.shape} do not divide into groups of "
                         f"{group_size}")
    groups, exponent = _scaled(rewards.reshape(-1, group_size), axis=1)
    # The mean of equal numbers is not always that number in float32, so equality is asked of the
    # rewards themselves.
    spread = jnp.max(groups, axis=1, keepdims=True) > jnp.min(groups, axis=1, keepdims=True)
    centred = jnp.where(spread, groups - jnp.mean(groups, axis=1, keepdims=True), 0.0)
    if form == "dr_grpo":
        return jnp.ldexp(centred, exponent).reshape(-1)
    if form == "leave_one_out":  # which is r - mean, times this
        others = group_size / max(group_size - 1, 1)
        return jnp.ldexp(centred * others, exponent).reshape(-1)
    # beside large rewards EPSILON is flushed to 0, and of a group without spread 0 / 0 would be
    # left
    deviation = jnp.where(spread, jnp.std(groups, axis=1,
                                          keepdims=True) + jnp.ldexp(EPSILON, -exponent), 1.0)
    return (centred / deviation).reshape(-1)


def whitened(rewards: jax.Array, mask: jax.Array) -> jax.Array:
    """`(r - mean) / (std + EPSILON)` over all tokens of a mask, each with its own reward or that of
    its row; all 0 where there is no spread. Arguments and result as in `advantages_of`."""
    by_token = rewards.reshape(rewards.shape[0], -1)
    of_rows = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32)
    weight = of_rows if by_token.shape[1] == 1 else mask.astype(jnp.float32)
    there, count = weight > 0, jnp.maximum(of_rows.sum(), 1.0)
    values, exponent = _scaled(jnp.where(there, by_token, 0.0), axis=None)
    spread = (jnp.max(values, initial=-jnp.inf, where=there)
              > jnp.min(values, initial=jnp.inf, where=there))
    centred = jnp.where(there & spread, values - jnp.sum(weight * values) / count, 0.0)
    deviation = jnp.sqrt(jnp.sum(weight * jnp.square(centred)) / count)
    scale = jnp.where(spread, deviation + jnp.ldexp(EPSILON, -exponent.reshape(())), 1.0)
    return (centred / scale).reshape(rewards.shape)


def _scaled(rewards: jax.Array, axis: int | None) -> tuple[jax.Array, jax.Array]:
    """Rewards as float32 over a power of two, and its exponent: the squares of large ones are
    beyond float32. A power of two rounds nothing, so that what comes out is the same."""
    rewards = rewards.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(rewards), axis=axis, keepdims=True))
    return jnp.ldexp(rewards, -exponent), exponent
