"""Keys of every kind name noise, whatever JAX's default generator is."""

import jax
import numpy as np
import pytest

import jspec
from pallas_kernels.noise import key_words
from tests.speculate import drafters, tiny


def make_batch(seed):
    return jspec.PromptBatch.from_tokens([[1, 2, 1], [5]], group_size=2, seed=seed, buckets=(8,))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_default_generators(impl):
    """A seed is the same noise under them; keys of their own kind are noise too."""
    policy = tiny.policy(11)
    draft = drafters.make("suffix", policy)
    with jax.default_prng_impl(impl):
        np.testing.assert_array_equal(key_words(make_batch(5).key),
                                      key_words(jax.random.key(5, impl="threefry2x32")))
        first, second = (key_words(make_batch(jax.random.key(seed)).key).tolist()
                         for seed in (5, 6))
        assert first != second
        batch = make_batch(jax.random.key(5))

        def step(policy, draft, batch):
            out = jspec.rollout(policy, draft, batch, sampling=jspec.Sampling(max_new_tokens=3))
            return draft.drafter.remember(draft, batch, out), out

        after, out = jax.eval_shape(step, policy, draft, batch)
    assert (jax.tree.map(lambda x: (x.shape, x.dtype), after.state)
            == jax.tree.map(lambda x: (x.shape, x.dtype), draft.state))
    assert out.tokens.shape == (4, 3)
