import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jspec.rl.advantages import EPSILON, group_advantages

advantages_of = jax.jit(group_advantages, static_argnums=(1, 2))


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-5, 5, width=32)))
def test_equals_numpy_in_float64(groups):
    wide = groups.astype(np.float64)
    centred = wide - wide.mean(1, keepdims=True)
    spread = np.ptp(groups, axis=1, keepdims=True) > 0
    expected = np.where(spread, centred, 0.0)
    np.testing.assert_allclose(advantages_of(groups.ravel(), 4, "dr_grpo"), expected.ravel(),
                               atol=2e-6)
    # below that, float32 cannot agree with float64 on the deviation
    if (np.ptp(groups, axis=1) > 1e-2).all():
        expected = centred / (wide.std(1, keepdims=True) + EPSILON)
        np.testing.assert_allclose(advantages_of(groups.ravel(), 4, "group"), expected.ravel(),
                                   atol=2e-3)


def test_by_hand():
    rewards = jnp.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    centred = [0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]
    np.testing.assert_allclose(group_advantages(rewards, 4, "dr_grpo"), centred)
    normalised = [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5), 1, 1, -1, -1]
    np.testing.assert_allclose(group_advantages(rewards, 4, "group"), normalised, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e6, 1e20, 1e30, 2e38])
def test_large_rewards_are_as_exact(scale):
    rewards = np.float32(scale) * np.array([1.0, 0.0, 0.5, 0.0, 0.25, -1.0, 1.0, 1.0], np.float32)
    groups = rewards.astype(np.float64).reshape(2, 4)
    centred = groups - groups.mean(1, keepdims=True)
    expected = centred / groups.std(1, keepdims=True)
    np.testing.assert_allclose(advantages_of(rewards, 4, "group"), expected.ravel(), rtol=1e-5)
    np.testing.assert_allclose(advantages_of(rewards, 4, "dr_grpo"), centred.ravel(), rtol=1e-5)


def test_scaling_rounds_nothing():
    """What ordinary rewards give is what it was without it, bit for bit."""
    rewards = np.random.default_rng(0).normal(0, 3, 64).astype(np.float32)
    groups = jnp.asarray(rewards).reshape(-1, 4)
    plain = jax.jit(lambda x: (x - x.mean(1, keepdims=True))
                    / (x.std(1, keepdims=True) + EPSILON))(groups)
    np.testing.assert_array_equal(advantages_of(rewards, 4, "group"), plain.ravel())


@pytest.mark.parametrize("form", ["group", "dr_grpo"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.3, 1e6, 1e33, -3e38])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_groups_without_spread_are_exactly_zero(form, value, size):
    advantages = advantages_of(jnp.full([2 * size], value), size, form)
    assert (np.asarray(advantages) == 0.0).all()


def test_groups_do_not_see_each_other():
    alone = group_advantages(jnp.array([0.2, 0.9]), 2)
    together = group_advantages(jnp.array([5.0, -3.0, 0.2, 0.9]), 2)
    np.testing.assert_array_equal(alone, together[2:])


def test_integer_rewards_become_float32():
    assert group_advantages(jnp.array([0, 1]), 2).dtype == jnp.float32


@pytest.mark.parametrize(
    "shape, size, form, message",
    [
        ([6], 4, "group", r"\(6,\) do not divide into groups of 4"),
        ([2, 2], 2, "group", "do not divide"),
        ([4], 2, "grpo", "'grpo' is none of a group's: group, dr_grpo, leave"),
    ],
)
def test_misuse_is_refused(shape, size, form, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.zeros(shape), size, form)
