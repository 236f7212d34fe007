"""Unlikely tokens cut off (top-k, top-p, min-p): the update learns the distribution that is left,
which answers were drawn from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.config import load_config
from jspec.model import ModelConfig, init_policy
from jspec.rl import losses
from jspec.rl import update as up
from jspec.rl.batch import make_batch
from jspec.rl.state import init_state
from jspec.rl.update_settings import Cut, UpdateSettings

CONFIG = ModelConfig(vocab_size=23, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
                     num_kv_heads=2, head_dim=8, initializer_range=0.2)
CUT = Cut(top_k=15, top_p=0.9, min_p=0.05)
SETTINGS = UpdateSettings(temperature=0.8, cut=CUT, learning_rate=1e-3)


@pytest.fixture(scope="module")
def rolled():
    """(state, batch) of answers drawn with CUT."""
    policy = init_policy(CONFIG, jax.random.key(0))
    prompts = jspec.PromptBatch.from_tokens([[1, 2, 3], [4, 5]], group_size=8, seed=0)
    out = jspec.rollout(policy, None, prompts, sampling=jspec.Sampling(
        max_new_tokens=12, temperature=0.8, top_k=CUT.top_k, top_p=CUT.top_p, min_p=CUT.min_p))
    advantages = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    return init_state(policy, None, SETTINGS, seed=0), make_batch(prompts, out, advantages)


def learned(rolled, settings):
    state, batch = rolled
    return jax.jit(up.update, static_argnames="settings")(state, None, batch, settings)


def test_the_first_ratio_is_one(rolled):
    """Of what is left, to rounding; of the whole distribution to what was drawn it is not."""
    _, metrics = learned(rolled, SETTINGS)
    state, batch = rolled
    assert float(metrics["logprob_gap"]) < 1e-5 and float(metrics["cut_flip_rate"]) == 0
    assert 0.8 < float(metrics["kept_mass"]) < 0.98
    behaviour = np.asarray(batch.behaviour_logprobs)[np.asarray(batch.mask)]
    whole = np.asarray(batch.logprobs)[np.asarray(batch.mask)]
    assert np.exp(whole - behaviour).min() > 0.7 and (whole < behaviour + 1e-6).all()
    on_policy = -np.sum(np.asarray(batch.advantages)[:, None] * np.asarray(batch.mask)
                        ) / np.asarray(batch.mask).sum()
    np.testing.assert_allclose(metrics["loss"], on_policy, atol=1e-5)
    _, whole = learned(rolled, dataclasses.replace(SETTINGS, cut=None))
    np.testing.assert_allclose(whole["kept_mass"], metrics["kept_mass"])  # the bias is said then
    wrong = dataclasses.replace(batch, behaviour_logprobs=batch.logprobs)
    _, metrics = learned((state, wrong), SETTINGS)
    assert abs(float(metrics["loss"]) - on_policy) > 1e-3


def test_gradients_are_of_the_distribution_that_is_left():
    """Against log-softmax over the ids that NumPy keeps; -inf, without a gradient, of others."""
    rng = np.random.default_rng(0)
    policy = init_policy(CONFIG, jax.random.key(0))
    hidden = jnp.asarray(rng.normal(size=(2, 9, 32)), jnp.float32)
    logits = np.asarray(losses.logits(policy, hidden), np.float64) / 0.8
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = p >= 0.3 * p.max(-1, keepdims=True)
    tokens = jnp.asarray(p.argmax(-1), jnp.int32)
    outside = jnp.asarray(p.argmin(-1), jnp.int32)
    kept = jnp.asarray(kept)

    def ours(hidden, tokens):
        out = losses.token_logprobs(policy, hidden, tokens, 0.8, cut=Cut(min_p=0.3))[2]
        return jnp.sum(jnp.where(out > -jnp.inf, out, 0.0)), out

    def theirs(hidden):
        z = jnp.where(kept, losses.logits(policy, hidden) / 0.8, -jnp.inf)
        return jnp.take_along_axis(jax.nn.log_softmax(z), tokens[..., None], -1).sum()

    (value, _), grad = jax.value_and_grad(ours, has_aux=True)(hidden, tokens)
    want, wanted = jax.value_and_grad(theirs)(hidden)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, wanted, atol=1e-5)
    grad, out = jax.grad(ours, has_aux=True)(hidden, outside)
    assert np.isneginf(out).all() and not np.asarray(grad).any()


def test_a_token_that_the_policy_cuts_off_by_now_teaches_nothing(rolled):
    state, batch = rolled
    strict = dataclasses.replace(SETTINGS, cut=Cut(top_k=1))
    new, metrics = learned((state, batch), strict)
    assert float(metrics["cut_flip_rate"]) > 0.3
    assert np.isfinite(float(metrics["loss"])) and int(new.skipped) == 0


def test_a_run_learns_what_it_draws_from_unless_it_is_told_otherwise():
    assert UpdateSettings.of(load_config(None, ["sampling.top_p=0.9"])).cut == Cut(top_p=0.9)
    for override in ("sampling.top_p=1", "grpo.truncated_ratio=false", "sampling.temperature=0"):
        assert UpdateSettings.of(load_config(None, ["sampling.top_p=0.9", override])).cut is None
