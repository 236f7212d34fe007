"""Optimizers and schedules are optax's own, called directly."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jspec.config import load_config
from jspec.errors import InputError
from jspec.model import ModelConfig, param_specs
from jspec.model.config import Experts
from jspec.rl.optimizers import inside_blocks, optimizer, optimizers, rate
from jspec.rl.update_settings import OptimizerSettings, UpdateSettings

WEIGHTS = {"embed": np.array([[0.5, -1.0, 2.0]], np.float32),
           "layers": {"q": np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 3, 2)}}
GRADS = [jax.tree.map(lambda x, scale=scale: np.float32(scale) * np.cos(x), WEIGHTS)
         for scale in (0.1, 2.0, -0.3)]


def after(transformation):
    weights, state = WEIGHTS, transformation.init(WEIGHTS)
    for grads in GRADS:
        changes, state = transformation.update(grads, state, weights)
        weights = optax.apply_updates(weights, changes)
    return weights, state


def dims(weights):
    return {"embed": None, "layers": {"q": optax.contrib.MuonDimensionNumbers(2, 1)}}


RULES = {
    "adamw": (dict(b1=0.8, b2=0.95, eps=1e-6), lambda dtype: optax.adamw(
        0.1, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.2, mu_dtype=dtype)),
    "lion": (dict(b1=0.8, b2=0.95), lambda dtype: optax.lion(
        0.1, b1=0.8, b2=0.95, weight_decay=0.2, mu_dtype=dtype)),
    "sgd": (dict(momentum=0.7), lambda dtype: optax.chain(
        optax.add_decayed_weights(0.2), optax.sgd(0.1, 0.7, accumulator_dtype=dtype))),
    "muon": (dict(b1=0.8, b2=0.95, eps=1e-6, momentum=0.7), lambda dtype: optax.contrib.muon(
        0.1, adam_b1=0.8, adam_b2=0.95, eps=1e-6, beta=0.7, weight_decay=0.2,
        adam_weight_decay=0.2, consistent_rms=0.2, mu_dtype=dtype,
        muon_weight_dimension_numbers=dims))}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rule_is_optaxs_behind_the_clip(name, dtype):
    options, theirs = RULES[name]
    settings = OptimizerSettings(name, 0.1, clip=1.5, weight_decay=0.2, state_dtype=dtype,
                                 **options)
    with jax.numpy_dtype_promotion("standard"):  # of optax
        ours, state = after(optimizer(settings, 0.1))
        expected, their_state = after(optax.chain(
            optax.clip_by_global_norm(1.5), theirs(None if dtype == "float32" else dtype)))
    jax.tree.map(np.testing.assert_array_equal, (ours, state), (expected, their_state))
    kept = {str(x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(state)
            if {".mu", ".trace"} & {str(entry) for entry in path}}
    assert kept == {dtype}


def test_what_is_not_set_is_optaxs_default():
    for name, theirs in (("adamw", optax.adamw(0.1, weight_decay=0.0)),
                         ("lion", optax.lion(0.1, weight_decay=0.0)), ("sgd", optax.sgd(0.1))):
        ours, _ = after(optimizer(OptimizerSettings(name, clip=1e9), 0.1))
        jax.tree.map(np.testing.assert_array_equal, ours, after(theirs)[0])


def test_second_moments_in_bfloat16_would_never_fall_again():
    """Why `state_dtype` leaves them alone."""
    nu = jnp.asarray(1.0, jnp.bfloat16)
    assert (nu * 0.999).astype(jnp.bfloat16) == nu
    with jax.numpy_dtype_promotion("standard"):
        _, state = after(optimizer(OptimizerSettings(state_dtype="bfloat16"), 0.1))
    assert jax.tree.leaves(state[1][0].nu)[0].dtype == jnp.float32


@pytest.mark.parametrize("name, theirs", [
    ("cosine", optax.cosine_decay_schedule(0.5, 8, alpha=0.2)),
    ("linear", optax.linear_schedule(0.5, 0.1, 8)),
    ("constant", optax.constant_schedule(0.5))])
def test_a_schedule_is_optaxs_after_a_warmup_that_already_moves(name, theirs):
    settings = OptimizerSettings(learning_rate=0.5, schedule=name, end_learning_rate=0.1,
                                 decay_steps=8)
    np.testing.assert_allclose([rate(settings, i) for i in range(11)],
                               [theirs(i) for i in range(11)], rtol=1e-6)
    warmed = dataclasses.replace(settings, warmup_steps=4, decay_steps=12)
    np.testing.assert_allclose([rate(warmed, i) for i in range(15)],
                               [0.125, 0.25, 0.375, 0.5, *(theirs(i) for i in range(11))],
                               rtol=1e-6)
    assert rate(warmed, jnp.int32(2)).dtype == jnp.float32


def test_the_rate_is_that_of_the_runs_step_and_the_state_knows_no_schedule():
    made = []
    with mock.patch("jspec.rl.optimizers.optimizer", lambda each, rate: made.append(float(rate))):
        draft = OptimizerSettings(learning_rate=4.0, schedule="linear", decay_steps=4)
        settings = UpdateSettings(learning_rate=1.0, warmup_steps=2, updates_per_rollout=3,
                                  draft_optimizer=draft)
        for updates in (0, 2, 3, 9):
            optimizers(settings, jnp.int32(updates))
    assert made == [0.5, 4.0, 0.5, 4.0, 1.0, 3.0, 1.0, 1.0]
    plain, falling = (jax.tree.structure(optimizers(
        UpdateSettings(schedule=name, decay_steps=9))[0].init(WEIGHTS))
        for name in ("constant", "cosine"))
    assert plain == falling


def test_muon_has_the_stacked_matrices_of_layers_and_of_their_experts():
    model = ModelConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=2, num_heads=2,
                        num_kv_heads=1, head_dim=2, qk_norm=True, family="qwen3_moe",
                        experts=Experts(count=2, top_k=1, intermediate_size=4))
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype),
                          param_specs(model), is_leaf=lambda x: hasattr(x, "axes"))
    found = inside_blocks(shapes)
    assert {name for name, given in found["layers"].items() if given} == {
        "q", "k", "v", "o", "router", "expert_gate_up", "expert_down"}
    assert found["layers"]["expert_gate_up"] == optax.contrib.MuonDimensionNumbers(4, 3)
    assert found["embed"] is found["final_norm"] is None


@pytest.mark.parametrize(("overrides", "message"), [
    (["grpo.optimizer=adam"], "override 'grpo.optimizer=adam': 'grpo.optimizer' must be one of "
     "adamw, lion, muon, sgd, not 'adam'"),
    (["grpo.optimizer=sgd", "grpo.b2=0.9"], "grpo.b2 is set, and grpo.optimizer=sgd has only "
     "momentum; leave it out"),
    (["draft.momentum=0.9"], "draft.momentum is set, and draft.optimizer=adamw has only b1, b2, "
     "eps; leave it out"),
    (["grpo.decay_steps=9"], "grpo.decay_steps is of a learning rate that falls, and "
     "grpo.schedule=constant does not; set it to cosine or linear, or leave decay_steps out"),
    (["grpo.schedule=cosine", "grpo.warmup_steps=6"], "grpo.schedule=cosine falls after "
     "grpo.warmup_steps=6 until step 6 (steps), which is no later; warm up over fewer"),
    (["draft.schedule=linear", "draft.end_learning_rate=1"], "draft.end_learning_rate=1 is above "
     "draft.learning_rate=0.001, from which it falls"),
    (["grpo.optimizer=muon", "lora.rank=4"], "grpo.optimizer=muon is of whole matrices, and "
     "lora.rank trains adapters of them; choose another optimizer"),
])
def test_an_optimizer_that_cannot_be_is_one_line(overrides, message):
    with pytest.raises(InputError) as caught:
        load_config(None, overrides)
    assert str(caught.value) == message


def test_decay_steps_are_the_runs_unless_they_are_set():
    config = load_config(None, ["steps=40", "grpo.schedule=cosine", "draft.schedule=linear",
                                "draft.decay_steps=30", "draft.b1=0.8"])
    settings = UpdateSettings.of(config)
    assert (settings.decay_steps, settings.draft_optimizer.decay_steps) == (40, 30)
    assert (settings.draft_optimizer.b1, settings.draft_optimizer.learning_rate) == (0.8, 1e-3)
