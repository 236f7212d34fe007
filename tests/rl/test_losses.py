"""The losses against plain NumPy, and what they must not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspec.model import ModelConfig, init_policy, logits
from jspec.rl import losses
from jspec.rl.aggregation import Totals
from jspec.rl.batch import TrainBatch
from jspec.rl.objectives import Tokens, loss_of
from jspec.rl.update_settings import UpdateSettings

CONFIG = ModelConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
                     num_kv_heads=1, head_dim=8, initializer_range=0.5)
N, T = 3, 10


@pytest.fixture(scope="module")
def policy():
    return init_policy(CONFIG, jax.random.key(0))


def states():
    a, b = jax.random.split(jax.random.key(1))
    return jax.random.normal(a, (N, T, CONFIG.hidden_size)), jax.random.randint(b, (N, T), 0,
                                                                                CONFIG.vocab_size)


def plain(policy, hidden, tokens, temperature):
    z = np.asarray(logits(policy, hidden), np.float64) / np.reshape(temperature, (-1, 1, 1))
    logp = (z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - z.max(-1, keepdims=True))
    return (np.take_along_axis(logp, np.asarray(tokens)[..., None], -1)[..., 0],
            -(np.exp(logp) * logp).sum(-1))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7, np.array([0.5, 1.0, 2.0])])
def test_logprobs_and_entropy_in_chunks_are_those_of_the_whole(policy, chunk_tokens, temperature):
    hidden, tokens = states()
    logprobs, entropy, _ = losses.token_logprobs(policy, hidden, tokens, temperature, chunk_tokens)
    expected, expected_entropy = plain(policy, hidden, tokens, temperature)
    np.testing.assert_allclose(logprobs, expected, atol=2e-6)
    np.testing.assert_allclose(entropy, expected_entropy, atol=2e-6)


def test_temperature_zero_is_scored_as_one(policy):
    hidden, tokens = states()
    mixed, *_ = losses.token_logprobs(policy, hidden, tokens, jnp.array([0.0, 2.0, 1.0]))
    expected, _ = plain(policy, hidden, tokens, np.array([1.0, 2.0, 1.0]))
    np.testing.assert_allclose(mixed, expected, atol=2e-6)


@pytest.mark.parametrize("temperature", [1e-2, 1e-12, 1.2e-38])
def test_a_small_temperature_is_the_limit(policy, temperature):
    """Of the likeliest token 0, or the logarithm of those that tie, with no gradient that is not
    finite."""
    hidden, _ = states()
    z = np.asarray(logits(policy, hidden), np.float64)
    best = jnp.asarray(z.argmax(-1))
    raw = (z - z.max(-1, keepdims=True)) / np.float64(np.float32(temperature))

    def total(hidden):
        out = losses.token_logprobs(policy, hidden, best, temperature)
        return out[0].sum(), out

    (_, (got, entropy, _)), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(hidden)
    p = np.exp(raw) / np.exp(raw).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, np.log(p.max(-1)), atol=1e-4)
    np.testing.assert_allclose(entropy, -(p * np.log(np.where(p > 0, p, 1))).sum(-1), atol=1e-3)
    assert np.isfinite(grad).all()


def test_below_the_normal_numbers_a_temperature_is_zero(policy):
    hidden, tokens = states()
    score = jax.jit(losses.token_logprobs)
    for a, b in zip(score(policy, hidden, tokens, 1e-39)[:2],
                    score(policy, hidden, tokens, 0.0)[:2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_ids_without_a_token_are_not_counted(policy):
    """What is left is a policy of the other ids; and padding, which may be such an id, leaves no
    gradient."""
    hidden, tokens = states()
    lacking = policy.replace(config=dataclasses.replace(CONFIG, tokenless=((30, 37),)))
    has = policy.replace(weights={"embed": policy.weights["embed"][:30]})
    real = tokens % 30
    score = jax.jit(losses.token_logprobs)
    for a, b in zip(score(lacking, hidden, real, 0.7)[:2], score(has, hidden, real, 0.7)[:2],
                    strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)
    mask = tokens < 30

    def loss(weights, hidden):
        logprobs, *_ = losses.token_logprobs(lacking.replace(weights=weights), hidden,
                                            jnp.where(mask, tokens, 36), 0.7)
        each, _ = grpo_losses(logprobs, jnp.ones(N), mask)
        return losses.kl_estimate(logprobs, logprobs - 0.1, mask, "k3").sum() - each.sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(policy.weights, hidden)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert np.any(grads[0]["embed"][:30]) and not np.any(grads[0]["embed"][30:])


def test_gradient_in_chunks_is_that_of_the_whole(policy):
    hidden, tokens = states()

    def loss(weights, hidden, chunk_tokens):
        return losses.token_logprobs(policy.replace(weights=weights), hidden, tokens, 0.7,
                                     chunk_tokens)[0].sum()

    whole = jax.grad(loss, (0, 1))(policy.weights, hidden, 1024)
    parts = jax.grad(loss, (0, 1))(policy.weights, hidden, 6)
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(whole)) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


def test_entropy_has_no_gradient(policy):
    hidden, tokens = states()
    grad = jax.grad(lambda h: losses.token_logprobs(policy, h, tokens, 1.0)[1].sum())(hidden)
    assert not jnp.any(grad)


def test_entropy_has_its_gradient_where_it_is_in_the_loss(policy):
    hidden, tokens = states()

    def direct(hidden):
        logp = jax.nn.log_softmax(logits(policy, hidden) / 0.7)
        return -(jnp.exp(logp) * logp).sum()

    def chunked(hidden):
        return losses.token_logprobs(policy, hidden, tokens, 0.7, 6, through_entropy=True)[1].sum()

    np.testing.assert_allclose(jax.grad(chunked)(hidden), jax.grad(direct)(hidden), atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_logits_of_all_positions_never_exist_at_once(policy, backward):
    hidden = jnp.zeros((4, 512, CONFIG.hidden_size))
    tokens = jnp.zeros((4, 512), jnp.int32)

    def loss(hidden):
        return losses.token_logprobs(policy, hidden, tokens, 1.0, chunk_tokens=64)[0].sum()

    text = jax.jit(jax.grad(loss) if backward else loss).lower(hidden).as_text()
    assert f"4x16x{CONFIG.vocab_size}xf32" in text  # 64 tokens of logits
    assert (f"512x{CONFIG.vocab_size}xf32" not in text
            and f"2048x{CONFIG.vocab_size}xf32" not in text)
    assert f"32x4x16x{CONFIG.vocab_size}xf32" not in text  # nor stacked up by the scan


def test_states_that_predict_the_response():
    responses = 100 + jnp.arange(4 * 3, dtype=jnp.float32).reshape(4, 3, 1)
    got = losses.predicting(jnp.array([0.0, 0.0, 7.0, 7.0])[:, None], responses)
    np.testing.assert_array_equal(got[..., 0],
                                  [[0, 100, 101], [0, 103, 104], [7, 106, 107], [7, 109, 110]])


def test_grpo_by_hand():
    ratio = np.array([0.5, 0.9, 1.0, 1.25, 1.5, 9.0])
    mask = np.array([True] * 5 + [False])
    loss, metrics = grpo_losses(jnp.log(jnp.array([ratio] * 2)), jnp.array([2.0, -2.0]),
                                jnp.array([mask] * 2))
    # gains are capped at 1.28
    np.testing.assert_allclose(-loss[0], [1.0, 1.8, 2.0, 2.5, 2.56, 0], rtol=1e-6)
    # losses at 0.8
    np.testing.assert_allclose(-loss[1], [-1.6, -1.8, -2.0, -2.5, -3.0, 0], rtol=1e-6)
    assert metrics["clip_fraction/high"] == metrics["clip_fraction/low"] == np.float32(0.1)
    assert metrics["clip_fraction"] == np.float32(0.2)
    np.testing.assert_allclose(metrics["loss"], loss.sum(), rtol=1e-6)


def test_a_clipped_token_has_no_gradient_and_a_masked_one_may_hold_anything():
    logprobs = jnp.log(jnp.array([[1.5, 1.0, 1.1, jnp.nan]]))
    mask = jnp.array([[True, True, True, False]])
    grad = jax.grad(lambda x: -grpo_losses(x, jnp.array([3.0]), mask)[0].sum())(logprobs)
    np.testing.assert_allclose(grad, [[0, 3.0, 3.3, 0]], rtol=1e-6)


def grpo_losses(log_ratio, advantages, mask):
    """(the loss of each token of answers whose sampled log-probabilities are 0, metrics)."""
    settings = UpdateSettings()
    rows = TrainBatch(None, None, None, jnp.zeros(mask.shape), mask, advantages,
                      shares=jnp.ones(len(mask)))
    totals = Totals(mask.sum(dtype=jnp.float32), jnp.float32(1))
    tokens = Tokens(log_ratio, jnp.where(mask, log_ratio, 0), advantages[:, None], mask)
    each, _ = loss_of(settings.objective, tokens, settings)
    return each, losses.answer_loss(log_ratio, jnp.zeros(mask.shape), None, rows, totals,
                                    settings)[1]


def test_k3_is_an_unbiased_and_never_negative_kl():
    a, b = jax.random.split(jax.random.key(3))
    p, q = (jax.nn.log_softmax(jax.random.normal(k, (50,))) for k in (a, b))
    each = losses.kl_estimate(p[None], q[None], jnp.ones((1, 50), bool), "k3")[0]
    assert jnp.all(each >= 0)
    np.testing.assert_allclose(jnp.sum(jnp.exp(p) * each), jnp.sum(jnp.exp(p) * (p - q)), rtol=1e-5)
    nothing = jnp.zeros((1, 50), bool)
    assert not jnp.any(losses.kl_estimate(p[None], q[None], nothing, "k3"))


def test_quantiles_of_histograms_that_are_added_up():
    """Within a bin of NumPy's, whatever is masked; never above the maximum, and NaN where that
    is."""
    rng = np.random.default_rng(0)
    gaps = (10.0 ** rng.uniform(-6, 1, (2, 4000))).astype(np.float32)
    mask = rng.random(gaps.shape) < 0.9
    counts = sum(losses.histogram(jnp.asarray(g), jnp.asarray(m))
                 for g, m in zip(gaps, mask, strict=True))
    assert counts.dtype == jnp.int32 and int(counts.sum()) == mask.sum()
    shares, most = (0.5, 0.99, 0.999, 1.0), gaps[mask].max()
    got = np.asarray(losses.quantiles(counts, jnp.asarray(most), shares))
    want = np.quantile(gaps[mask], shares, method="inverted_cdf")
    assert np.all((want <= got) & (got <= want * (1 + 1 / 16))) and got[-1] == most

    def of(values, most):
        values = jnp.asarray(values, jnp.float32)
        counts = losses.histogram(values, jnp.ones(values.shape, bool))
        return losses.quantiles(counts, jnp.float32(most), (0.5, 1.0)).tolist()

    assert of([0.0, 0.0], 0.0) == [0, 0] and of([1e-12, 100.0, 1e6], 1e6)[1] == 1e6
    assert of([0.0, 1e-12, np.inf], np.inf) == [2.0**-24, np.inf]
    assert np.isnan(of([0.0, 0.0, np.nan], np.nan)).all()
    assert of([], 0.0) == [0, 0]


def test_outside_the_clips_range():
    got = losses.outside(jnp.log(jnp.array([[0.79, 0.81, 1.0, 1.27, 1.29]])), jnp.zeros((1, 5)),
                         0.2, 0.28)
    np.testing.assert_array_equal(got, [[True, False, False, False, True]])
