"""The verifier's experts, replayed in the update: what rounding then no longer changes, and how
often it would."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jspec
from jspec.model import Experts
from jspec.model.experts import route
from jspec.rl import update as up
from jspec.rl.batch import make_batch
from jspec.rl.micro_batches import accumulate, shapes
from jspec.rl.objective import policy_loss, prompt_states
from jspec.rl.state import init_state
from jspec.rl.update_settings import UpdateSettings
from tests.rl.test_update import close
from tests.speculate import tiny

LAYERS, P, G, T = 1, 32, 4, 24
SETTINGS = UpdateSettings(micro_batch=32, widths=(T,))
UNREPLAYED = dataclasses.replace(SETTINGS, replay_routes=False)


def sparse_policy(layers):
    return tiny.policy(11, layers=layers, heads=4, kv_heads=2, hidden=32, scale=0.25,
                       family="qwen3_moe", experts=Experts(8, 2, 16), stop_tokens=(3,))


def learned_from(policy, prompts=P, cap=T):
    """A batch to learn from, sampled in the policy's dtype."""
    tokens = [[i % 11, (i * 7 + 1) % 11, 3][:1 + i % 3] for i in range(prompts)]
    batch = jspec.PromptBatch.from_tokens(tokens, group_size=G, seed=1, buckets=(8,))
    out = jspec.rollout(policy, None, batch, sampling=jspec.Sampling(max_new_tokens=cap),
                        speculation=jspec.Speculation(k=0))
    return make_batch(batch, out, jnp.tile(jnp.array([1.0, -1.0]), prompts * G // 2))


@pytest.fixture(scope="module")
def policy():
    return sparse_policy(LAYERS).replace(dtype="bfloat16")


@pytest.fixture(scope="module")
def batch(policy):
    return learned_from(policy)


@partial(jax.jit, static_argnames="settings")
def metrics_of(policy, batch, settings):
    """Those of an update, of which nothing but the loss is computed."""
    prompts = prompt_states(policy, batch, settings)[0]
    anchor = (policy, prompts) if settings.kl_weight else None
    batch, totals = up.with_shares(batch, settings)

    def one(micro):
        _, (metrics, *_) = policy_loss(policy.weights, prompts, policy, anchor, micro, totals,
                                       settings)
        return metrics, metrics.pop("logprob_gap")

    metrics, gap = accumulate(one, batch, shapes(batch, settings.micro_batch, settings.widths))
    return {"logprob_gap": gap, **up.gap_quantiles(metrics.pop("gap_counts"), gap), **metrics}


def test_replayed_routes_close_the_gap(policy, batch):
    replayed, own = (metrics_of(policy, batch, settings) for settings in (SETTINGS, UNREPLAYED))
    assert own["logprob_gap_p999"] > 5 * replayed["logprob_gap_p999"] > 0
    assert own["logprob_gap"] > 5 * replayed["logprob_gap"]
    # counted in replay too, though what is computed with is the same
    assert 1e-3 < replayed["route_flip_rate"] < own["route_flip_rate"] * 1.5 < 0.15
    assert replayed["logprob_gap_flip_rate"] == 0 < own["logprob_gap_flip_rate"]


@pytest.mark.slow
def test_the_reference_is_computed_with_them_too(policy, batch):
    settings = dataclasses.replace(SETTINGS, kl_weight=0.1, widths=(16,))
    assert metrics_of(policy, batch, settings)["kl"] == 0


def others(routes):
    """Two experts of 8 that these, uint8 [2], are not."""
    return jnp.argsort(jnp.zeros(8).at[routes].set(1))[:2].astype(jnp.uint8)


def test_a_planted_flip_is_counted_and_computed_with(policy, batch):
    row = int(jnp.argmax(batch.mask.sum(1)))
    prompt, end = row // G, int(batch.mask[row].sum()) - 1
    last = int(batch.prompt_lengths[prompt]) - 1
    assert all(batch.mask[prompt * G + i, 0] for i in range(G))

    def planted(routes, at):
        return routes.at[at].set(others(routes[at]))

    # of a token that others came after, of a prompt's last one, which siblings share, and of a
    # row's last one, of which nothing was computed; and two that are only swapped
    routes = planted(planted(batch.routes, (row, 1, 0)), (row, end, 0))
    routes = routes.at[row, 2].set(routes[row, 2, :, ::-1])
    wrong = batch.replace(routes=routes,
                          prompt_routes=planted(batch.prompt_routes, (prompt, last, 0)))
    before, after = (metrics_of(policy, b, UNREPLAYED) for b in (batch, wrong))
    tokens = float(batch.mask.sum())
    # of those that are planted none was flipped by rounding
    np.testing.assert_allclose(after["route_flip_rate"] - before["route_flip_rate"],
                               (1 + G) / tokens, rtol=1e-3)
    assert after["logprob_gap"] == before["logprob_gap"]
    assert (metrics_of(policy, wrong, SETTINGS)["logprob_gap"]
            > 5 * metrics_of(policy, batch, SETTINGS)["logprob_gap"])


def test_gates_of_replayed_experts_are_live():
    """Their gradients are those of chosen ones, and others' are others."""
    experts, keys = Experts(8, 2, 16), jax.random.split(jax.random.key(0), 3)
    x, router = jax.random.normal(keys[0], (24, 32)), jax.random.normal(keys[1], (8, 32))
    weights = jax.random.normal(keys[2], (24, 2))

    def gradient(routes):
        def loss(router):
            _, gates, chosen = route(experts, router, x, routes)
            return jnp.sum(gates * weights), chosen

        return jax.grad(loss, has_aux=True)(router)

    wanted, chosen = gradient(None)
    np.testing.assert_array_equal(gradient(chosen)[0], wanted)
    other, same = gradient((chosen + jnp.uint8(1)) % jnp.uint8(8))
    np.testing.assert_array_equal(same, chosen)
    assert optax.tree.norm(wanted) > 1e-3 and jnp.abs(other - wanted).max() > 1e-3


@pytest.mark.slow
def test_the_updates_gradient_is_the_same_where_the_experts_are():
    """In float32 none is flipped, through micro-batches, widths and recomputation."""
    policy = sparse_policy(1)
    made = learned_from(policy, prompts=2, cap=6)
    state = init_state(policy, None, SETTINGS, seed=0)
    gradients = jax.jit(up.gradients, static_argnums=3)
    plain = UpdateSettings(replay_routes=False, widths=(6,))
    replayed = UpdateSettings(micro_batch=2, widths=(3,), remat=True)
    with jax.numpy_dtype_promotion("standard"):  # a TPU's kernels are a library's, which promotes
        (wanted, _), _ = gradients(state, None, made, plain)
        (got, metrics), _ = gradients(state, None, made, replayed)
    close(wanted, got, 1e-5)
    assert metrics["route_flip_rate"] == 0 and metrics["logprob_gap"] < 1e-5
    assert optax.tree.norm(got["layers"]["router"]) > 1e-3
