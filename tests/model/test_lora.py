"""Adapters: what is multiplied with, and what is learned, are those of the merged matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspec.choices import BASE_DTYPES, LORA_TARGETS
from jspec.model import Experts, Lora, ModelConfig, init_policy, to_rollout, train_forward
from jspec.model.lora import abstract_adapted, merge, with_adapters

SIZES = dict(vocab_size=32, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
             num_kv_heads=2, head_dim=16)
MODELS = {"dense": ModelConfig(**SIZES),
          "sparse": ModelConfig(**SIZES, family="qwen3_moe", qk_norm=True,
                                experts=Experts(4, 2, 32, dense_layers=(0,)))}
TOKENS = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)


def adapted(model, base_dtype, targets=tuple(LORA_TARGETS)):
    """(the policy before, and with adapters whose B are no zeros)."""
    before = init_policy(model, 0)
    policy = with_adapters(before, Lora(4, 8.0, targets, base_dtype), jax.random.key(1))
    leaves, tree = jax.tree.flatten(policy.adapters)
    rng = np.random.default_rng(2)
    moved = [x + jnp.asarray(0.05 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return before, policy.replace(adapters=jax.tree.unflatten(tree, moved))


def loss(adapters, policy, merged=False):
    policy = policy.replace(adapters=adapters)
    hidden = train_forward(merge(policy) if merged else policy, TOKENS).hidden
    return jnp.sum(jnp.square(hidden) * jnp.arange(64, dtype=jnp.float32))


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize("kind, base_dtype", [
    *(pytest.param("dense", dtype, **({} if dtype == "int4" else SLOW)) for dtype in BASE_DTYPES),
    *(pytest.param("sparse", dtype, **SLOW) for dtype in ("bfloat16", "int4"))])
def test_value_and_gradients_are_those_of_the_merged_matrices(kind, base_dtype):
    _, policy = adapted(MODELS[kind], base_dtype)
    with jax.numpy_dtype_promotion("standard"):  # a TPU's kernels are a library's, which promotes
        value, grads = jax.value_and_grad(loss)(policy.adapters, policy)
        want, wanted = jax.value_and_grad(loss)(policy.adapters, policy, True)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for grad, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_fresh_adapters_change_nothing_and_a_base_in_float32_is_the_policy():
    before = init_policy(MODELS["dense"], 0)
    policy = with_adapters(before, Lora(4, 8.0, ("q_proj",), "float32"), jax.random.key(1))
    assert policy.adapters.keys() == {"q"}
    for x, y in zip(jax.tree.leaves(merge(policy).weights), jax.tree.leaves(before.weights),
                    strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", MODELS)
def test_the_shape_is_known_before_anything_is_computed(kind):
    before, policy = adapted(MODELS[kind], "int4")
    shape = abstract_adapted(before, policy.lora)
    assert jax.tree.structure(shape) == jax.tree.structure(policy)
    for x, y in zip(jax.tree.leaves(shape), jax.tree.leaves(policy), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_rollouts_are_made_with_the_merged_matrices():
    _, policy = adapted(MODELS["dense"], "int8")
    out = to_rollout(policy)
    assert out.adapters is None and out.lora is None
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(to_rollout(merge(policy))), strict=True):
        np.testing.assert_array_equal(x, y)
