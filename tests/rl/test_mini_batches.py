"""Updates on parts of a rollout, and the reference: in the reward, and where it moves."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspec.choices import AGGREGATIONS
from jspec.rl import update as up
from jspec.rl.batch import TrainBatch, part_of
from jspec.rl.penalty import penalised
from jspec.rl.state import COUNTERS, TrainState
from tests.rl.test_update import CONFIG as MODEL
from tests.rl.test_update import (
    SETTINGS,
    TRIMMED,
    G,
    N,
    P,
    T,
    close,
    init_policy,
    make_batch,
    make_state,
    own_logprobs,
    same_bits,
    update,
)

IN_REWARD = dataclasses.replace(SETTINGS, kl_weight=0.5, kl_in_reward=True, **TRIMMED)


def numbered(prompts, group):
    rows = jnp.arange(prompts * group)
    return TrainBatch(jnp.arange(prompts)[:, None], jnp.ones(prompts, jnp.int32), rows[:, None],
                      rows[:, None].astype(jnp.float32), rows[:, None] >= 0, None)


@pytest.mark.parametrize("shards, wanted", [(1, [0, 1, 2, 3]), (2, [0, 1, 4, 5]),
                                            (8, [0, 1, 2, 3])])
def test_a_part_is_whole_prompts_and_of_every_shard_as_many(shards, wanted, monkeypatch):
    monkeypatch.setattr("jspec.rl.batch.batch_shards", lambda layout: shards)
    batch = numbered(8, 3)
    parts = [part_of(batch, i, 2) for i in range(2)]
    assert parts[0].prompts[:, 0].tolist() == wanted
    for part in parts:
        np.testing.assert_array_equal(part.tokens[:, 0] // 3, jnp.repeat(part.prompts[:, 0], 3))
    rows = jnp.concatenate([part.tokens[:, 0] for part in parts])
    assert sorted(rows.tolist()) == list(range(24)) and part_of(batch, 0, 1) is batch


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_mean_of_the_parts_losses_is_the_rollouts(aggregation):
    settings = dataclasses.replace(SETTINGS, aggregation=aggregation, mini_batches=2)
    batch = make_batch()
    each = jnp.asarray(np.random.default_rng(1).normal(size=(N, T)), jnp.float32)

    def loss(batch, totals):
        return jnp.sum(batch.shares[:, None] * batch.logprobs, where=batch.mask) / totals.shares

    batch = batch.replace(logprobs=each)
    whole = loss(*up.with_shares(batch, dataclasses.replace(settings, mini_batches=1)))
    parts = [loss(*up.with_shares(batch, settings, updates)) for updates in (4, 5)]
    np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-5)


@pytest.mark.parametrize("updates, moves", [(0, 0), (3, 0), (4, 0), (5, 1), (6, 0), (11, 1)])
def test_the_reference_moves_with_the_last_update_of_every_third_step(updates, moves):
    settings = dataclasses.replace(SETTINGS, updates_per_rollout=2, kl_reference_every=3,
                                   kl_reference_mix=0.25)
    state = TrainState(*[None] * 4, updates=jnp.int32(updates), **dict.fromkeys(COUNTERS[1:]),
                       key=None, reference={"a": jnp.array([1.0, 2.0])})
    new = up.moved(state, {"a": jnp.array([3.0, 0.0])}, settings)
    np.testing.assert_array_equal(new["a"], [[1.0, 2.0], [1.5, 1.5]][moves])
    # so many steps have more updates than an int32 holds
    never = dataclasses.replace(settings, kl_reference_every=2**31 - 1)
    np.testing.assert_array_equal(up.moved(state, new, never)["a"], [1.0, 2.0])


@pytest.mark.slow
def test_updates_take_the_parts_in_turn_and_the_reference_moves_with_the_last():
    settings = dataclasses.replace(SETTINGS, mini_batches=2, kl_weight=0.5, kl_reference_every=1,
                                   kl_reference_mix=0.25, learning_rate=1e-2)
    state, batch = make_state(None, settings), make_batch()
    first, metrics = state.policy.weights, []
    same_bits(state.reference, first)
    for i in range(3):
        state, of_update = update(state, None, batch, settings)
        metrics.append(of_update)
        if i == 0:
            same_bits(state.reference, first)
        elif i == 1:
            wanted = jax.tree.map(lambda a, b: a + 0.25 * (b - a), first, state.policy.weights)
            close(state.reference, wanted, 1e-6)
            kept = state.reference
    same_bits(state.reference, kept)
    assert [float(of["trained_tokens"]) for of in metrics] == [
        float(batch.mask[at].sum()) for at in (slice(0, G), slice(G, N), slice(0, G))]
    assert abs(metrics[0]["kl"]) < 1e-6 < metrics[1]["kl"]
    assert settings.updates_per_step == 2 and P == 2


def test_the_kl_is_taken_off_rewards_token_by_token():
    state, batch, reference = make_state(None), make_batch(), init_policy(MODEL, jax.random.key(7))
    batch = batch.replace(advantages=None)
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=N), jnp.float32)
    kl = np.where(batch.mask, batch.logprobs - own_logprobs(reference, batch), 0)
    settings = dataclasses.replace(IN_REWARD, kl_estimate="k1")
    less = jax.jit(penalised, static_argnums=4)
    got, metrics = less(state, reference, batch, rewards, settings)
    np.testing.assert_allclose(got, rewards - 0.5 * kl.sum(1), atol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl.sum() / float(batch.mask.sum()), rtol=1e-4)
    # of REINFORCE++ what is still to come
    got, _ = less(state, reference, batch, rewards,
                  dataclasses.replace(settings, advantage="whitened"))
    to_come = np.stack([kl[:, t:].sum(1) for t in range(T)], 1)
    np.testing.assert_allclose(got, rewards[:, None] - 0.5 * to_come, atol=1e-4)
    # and the loss has none
    shapes = jax.eval_shape(partial(up.gradients, settings=settings), state, reference,
                            make_batch())
    assert "kl" not in shapes[0][1]
