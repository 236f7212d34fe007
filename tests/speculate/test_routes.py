"""The experts that computed each committed token come out of the rollout, whatever way it went."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.model import Experts, pool, train_forward
from jspec.rl.batch import join
from tests.speculate import drafters, tiny

PROMPTS = [[1, 2, 1, 2, 1], list(range(1, 9)) * 2, [7, 6] * 3, [4]]
SAMPLING = jspec.Sampling(max_new_tokens=12, min_new_tokens=9, stop_tokens=(3,),
                          limit=jnp.array([12, 12, 7, 12, 1, *[12] * 7]))
BATCH = jspec.PromptBatch.from_tokens(PROMPTS, group_size=3, seed=1, buckets=(16,))


@pytest.fixture(scope="module")
def policy():
    experts = Experts(count=8, top_k=2, intermediate_size=16, dense_layers=(1,))
    return tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.25,
                       family="qwen3_moe", experts=experts)


def run(policy, draft=None, k=0, slots=None, kv_tokens=None, depths=None):
    made = None if draft is None else drafters.make(draft, policy, seed=1, scale=0.05)
    return jspec.rollout(policy, made, BATCH, sampling=SAMPLING,
                         batching=jspec.Batching(slots, kv_tokens),
                         speculation=jspec.Speculation(k=k, rule="coupled", depths=depths))


@pytest.mark.slow
@pytest.mark.parametrize("draft, k, slots, kv_tokens", [
    ("ngram", ((2, 1), (12, 2)), None, 84),
    *(pytest.param(draft, k, slots, None, marks=pytest.mark.slow)
      for draft in drafters.NAMES for k, slots in ((2, 1), (3, 3))),
    pytest.param(None, 0, None, None, marks=pytest.mark.slow)])
def test_the_routes_are_the_training_forwards(policy, monkeypatch, draft, k, slots, kv_tokens):
    """Up to the token before the last, through refilled slots, fewer of them, pauses and drafts
    that are rejected; elsewhere the experts take turns."""
    monkeypatch.setattr(pool, "BLOCK", 4)
    out = run(policy, draft, k, slots, kv_tokens)
    assert draft is None or np.any(out.stats.accepted < out.stats.drafted)
    assert kv_tokens is None or out.stats.pauses[0] > 0 and out.stats.loop_cycles.min() > 0
    want = np.asarray(jax.jit(train_forward)(
        policy, join(BATCH.tokens, BATCH.lengths, out.tokens)).routes)
    got, of_prompts = np.asarray(out.routes), np.asarray(out.prompt_routes)
    assert got.shape == (12, 12, 2, 2) and of_prompts.shape == (4, 16, 2, 2)
    assert got.dtype == of_prompts.dtype == np.uint8 and len(np.unique(got)) == 8
    turns = (2 * np.arange(16)[:, None, None] + np.arange(2)) % 8
    assert set(np.asarray(out.lengths)) >= {1, 7, 12}
    for row, count in enumerate(np.asarray(out.lengths)):
        start = int(BATCH.lengths[row // 3])
        np.testing.assert_array_equal(of_prompts[row // 3, :start], want[row, :start])
        np.testing.assert_array_equal(got[row, :count - 1], want[row, start:start + count - 1])
        assert np.all(got[row, count - 1:] == turns[count - 1:12])
        assert np.all(of_prompts[row // 3, start:] == turns[start:])


def test_beside_the_states(policy):
    """A draft that learns from the rollout's states gets them without routes."""
    shapes = jax.eval_shape(lambda p: run(p, "mtp", 2, depths=(0, 2)), policy)
    assert shapes.trunk.routes is None and shapes.routes.shape == (12, 12, 2, 2)
    assert jax.eval_shape(run, tiny.policy(11)).routes is None
