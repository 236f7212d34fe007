"""From rewards to advantages: each answer is compared with the others that its own prompt got."""

import jax
import jax.numpy as jnp

from jspec.choices import ADVANTAGES, AdvantageForm

EPSILON = 1e-6
"""Added to a group's standard deviation. It only guards the division: groups without spread are set
to zero anyway."""


def group_advantages(rewards: jax.Array, group_size: int,
                     form: AdvantageForm = "group") -> jax.Array:
    """Advantages of N = prompts x group_size answers; row i belongs to prompt i // group_size.

    `group` is GRPO's (arXiv:2402.03300): `(r - mean) / (std + EPSILON)` with the mean and the
    population standard deviation of the row's own group. `dr_grpo` is Dr. GRPO's
    (arXiv:2503.20783): `r - mean`, which does not weigh up the groups whose answers hardly differ.
    A group whose rewards are all equal gets exactly zero in both.

    Args:
        rewards: float [N].
        group_size: answers a prompt, static.
        form: which of the two, static.

    Returns:
        float32 [N].

    Raises:
        ValueError: N is not a multiple of group_size, or the form is unknown.
    """
    if form not in ADVANTAGES:
        raise ValueError(f"advantage form {form!r} is neither 'group' nor 'dr_grpo'")
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards of shape {rewards.shape} do not divide into groups of "
                         f"{group_size}")
    groups = rewards.astype(jnp.float32).reshape(-1, group_size)
    # The squares of large rewards are beyond float32. A power of two rounds nothing: what comes out
    # is the same.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(groups), axis=1, keepdims=True))
    groups = jnp.ldexp(groups, -exponent)
    # The mean of equal numbers is not always that number in float32, so equality is asked of the
    # rewards themselves.
    spread = jnp.max(groups, axis=1, keepdims=True) > jnp.min(groups, axis=1, keepdims=True)
    centred = jnp.where(spread, groups - jnp.mean(groups, axis=1, keepdims=True), 0.0)
    if form == "dr_grpo":
        return jnp.ldexp(centred, exponent).reshape(-1)
    # beside large rewards EPSILON is flushed to 0, and of a group without spread 0 / 0 would be
    # left
    deviation = jnp.where(spread, jnp.std(groups, axis=1,
                                          keepdims=True) + jnp.ldexp(EPSILON, -exponent), 1.0)
    return (centred / deviation).reshape(-1)
