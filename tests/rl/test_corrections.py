"""Weights for the gap between the update's log-probabilities and the verifier's, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.choices import CORRECTIONS
from jspec.config import load_config
from jspec.errors import InputError
from jspec.model import ModelConfig, init_policy
from jspec.rl import losses
from jspec.rl.aggregation import Totals
from jspec.rl.batch import TrainBatch, make_batch
from jspec.rl.corrections import correction
from jspec.rl.objectives import find
from jspec.rl.rescore import own_logprobs
from jspec.rl.state import init_state
from jspec.rl.update_settings import Cut, UpdateSettings

METHODS = {"tis": (0.8, 1.3), "icepop": (0.7, 1.5), "sequence_mask": (0.9, 1.2)}
N, T = 6, 5


def case():
    """(gap, mask) with a row of no tokens."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < np.array([5, 4, 3, 1, 0, 5])[:, None]
    return rng.normal(0, 0.3, (N, T)).astype(np.float32), mask


def by_hand(gap, mask, method, low, high):
    """Weights and whether each was at a bound or outside, float64, a token at a time."""
    weights, outside = np.zeros((N, T)), np.zeros((N, T), bool)
    for i, j in zip(*np.nonzero(mask), strict=True):
        w = np.exp(np.float64(gap[i, j]))
        judged = np.exp(gap[i][mask[i]].mean()) if method == "sequence_mask" else w
        outside[i, j] = not low <= judged <= high
        weights[i, j] = min(max(w, low), high) if method == "tis" else w * (not outside[i, j])
    return weights, outside


@pytest.mark.parametrize("method", METHODS)
def test_weights(method):
    gap, mask = case()
    weights, about = correction(jnp.asarray(gap), jnp.asarray(mask), method, *METHODS[method])
    want, outside = by_hand(gap, mask, method, *METHODS[method])
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    assert 0 < outside.sum() < mask.sum()
    (share,) = about.keys() - {"correction_weight"}
    np.testing.assert_array_equal(about[share], outside)


def slopes(method):
    """(gradient of the loss by log-probability, what it is by hand)."""
    gap, mask = case()
    rng = np.random.default_rng(1)
    verifier, advantages = rng.normal(-2, 0.5, (N, T)), rng.normal(size=N)
    rows = TrainBatch(None, None, None, jnp.asarray(verifier, jnp.float32), jnp.asarray(mask),
                      jnp.asarray(advantages, jnp.float32), shares=jnp.ones(N))
    settings = UpdateSettings(correction=method, correction_bounds=METHODS[method])
    count = float(mask.sum())

    def loss(logprobs):
        return losses.answer_loss(logprobs, jnp.zeros((N, T)), None, rows,
                                  Totals(count, count), settings)[0]

    got = jax.grad(loss)(jnp.asarray(verifier + gap, jnp.float32))
    return got, -by_hand(gap, mask, method, *METHODS[method])[0] * advantages[:, None] / count


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_the_plain_one_weighted(method):
    np.testing.assert_allclose(*slopes(method), atol=1e-6)


def test_a_token_that_the_update_cut_off_at_first_spoils_no_answer():
    """Of several updates: its log-probability from before them is -inf, and of no account."""
    rng = np.random.default_rng(0)
    logprobs = jnp.asarray(rng.normal(-2, 0.1, (2, 3)), jnp.float32)
    rows = TrainBatch(None, None, None, logprobs, jnp.ones((2, 3), bool), jnp.ones(2),
                      shares=jnp.ones(2), behaviour_logprobs=logprobs,
                      own_logprobs=logprobs.at[0, 1].set(-jnp.inf))
    settings = UpdateSettings(objective=find("gspo"), correction="tis",
                              correction_bounds=(0.0, 2.0))

    def loss(drawn):
        return losses.answer_loss(logprobs, jnp.zeros((2, 3)), None, rows, Totals(6.0, 6.0),
                                  settings, drawn)[0]

    grad = np.asarray(jax.grad(loss)(logprobs))
    assert np.isfinite(grad).all() and grad[0, 1] == 0
    assert (np.abs(np.delete(grad.reshape(-1), 1)) > 1e-3).all()


def test_weights_that_are_learned_through_are_caught(monkeypatch):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    got, want = slopes("tis")
    assert np.abs(got - want).max() > 1e-2


@pytest.mark.parametrize("cut", [None, Cut(top_p=0.9)])
def test_what_the_update_makes_of_the_answers_is_what_the_verifier_did(cut):
    config = ModelConfig(vocab_size=23, hidden_size=32, intermediate_size=48, num_layers=2,
                         num_heads=4, num_kv_heads=2, head_dim=8, initializer_range=0.2)
    policy = init_policy(config, jax.random.key(0))
    prompts = jspec.PromptBatch.from_tokens([[1, 2, 3], [4, 5]], group_size=8, seed=0)
    out = jspec.rollout(policy, None, prompts, sampling=jspec.Sampling(
        max_new_tokens=12, top_p=1.0 if cut is None else cut.top_p))
    settings = UpdateSettings(cut=cut, micro_batch=3, widths=(5,))
    batch = make_batch(prompts, out, None)
    got = jax.jit(own_logprobs, static_argnames="settings")(
        init_state(policy, None, settings, seed=0), batch, settings)
    want = batch.logprobs if cut is None else batch.behaviour_logprobs
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_bounds_are_those_of_the_method_unless_they_are_set():
    def bounds(*overrides):
        return UpdateSettings.of(load_config(None, overrides)).correction_bounds

    for method, usual in CORRECTIONS.items():
        assert bounds(f"grpo.correction={method}") == usual
    assert bounds("grpo.correction=icepop", "grpo.correction_high=3") == (0.5, 3)
    with pytest.raises(InputError, match="grpo.correction_low bounds the weights of a correction"):
        load_config(None, ["grpo.correction_low=0.5"])


def test_only_later_updates_need_log_probabilities_from_before():
    settings = UpdateSettings(correction="tis", correction_bounds=(0.0, 2.0))
    assert not settings.rescores
    assert dataclasses.replace(settings, mini_batches=2).rescores
    assert not UpdateSettings(mini_batches=2).rescores
