"""EAGLE-3's cache follows the committed tokens, its loss trains what inference computes, and q is
what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.choices import DRAFT_LOSSES
from jspec.drafts.parts.fusing import default_depths
from jspec.errors import InputError
from jspec.model import RopeConfig, init_weights
from tests.drafts import recursive
from tests.speculate import tiny
from tests.speculate.enumeration import enumerate_sequences

REDUCED = dict(vocab=[0, 2, 3, 5, 7, 10], norm_before_residual=True, norm_before_fc=True,
               own_embed=True, window=3)
OWN_SIZES = dict(num_heads=6, num_kv_heads=3, head_dim=4, intermediate_size=24,
                 rope=RopeConfig(theta=300.0), qkv_bias=True, qk_norm=True)


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.2)


def make(policy, block=None, **options):
    """A draft with noise on every weight, and a block of other sizes than the policy's, as
    checkpoints have one."""
    draft = jspec.drafts.eagle3(policy, jax.random.key(1), **{"aux_depths": (0, 1, 3), **options})
    if block:
        config = dataclasses.replace(draft.config,
                                     block=dataclasses.replace(draft.config.block, **block))
        draft = draft.replace(config=config, weights=init_weights(draft.drafter.specs(config),
                                                                  jax.random.key(2), 0.2))
    return tiny.shaken(draft, scale=0.15)


LAYERS = dict(layers=2, window=(0, 2), qk_norm=True, fc_norm=True, norm_output=True,
              aux_depths=(1, 3))
VARIANTS = {"plain": {}, "reduced": REDUCED, "layers": LAYERS,
            "own-sizes": dict(block=OWN_SIZES, fc_norm=True, norm_output=True)}


def variants(*quick):
    return pytest.mark.parametrize(
        "variant", [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in VARIANTS])


@variants("layers")
def test_state_depends_on_committed_tokens_only(policy, variant):
    draft = make(policy, **VARIANTS[variant])
    recursive.check_state_depends_on_committed_tokens_only(policy, draft, without_entry=1)


@variants("reduced", "layers")
def test_the_loss_unrolls_what_propose_computes(policy, variant):
    recursive.check_the_loss_unrolls_what_propose_computes(
        policy, make(policy, **VARIANTS[variant]), first=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFT_LOSSES)
def test_the_loss_is_what_its_name_says_over_trained_tokens(policy, kind):
    recursive.check_the_loss_is_what_its_name_says_over_trained_tokens(
        policy, make(policy, **REDUCED), kind)


@pytest.mark.slow
def test_a_trained_draft_is_accepted_more_often(policy):
    fresh = jspec.drafts.eagle3(policy, jax.random.key(1), aux_depths=(1, 2, 3), own_embed=True)
    trained = recursive.check_a_trained_draft_is_accepted_more_often(policy, fresh)
    np.testing.assert_array_equal(trained.weights["embed"], policy.weights["embed"])


def test_training_reaches_every_weight_but_the_embedding(policy):
    draft = make(policy, **{**REDUCED, "depths": 1, "layers": 2, "qk_norm": True})
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 8)), jnp.int32)
    batch = recursive.lesson(policy, draft, tokens, jnp.array([2, 3]), jnp.ones((2, 5), bool))

    @jax.jit
    def gradient(weights):
        return jax.grad(lambda w: draft.drafter.loss(policy, draft.replace(weights=w), batch,
                                                     "kl")[0])(weights)

    reached = jax.tree.map(lambda g: bool(jnp.isfinite(g).all() & (g != 0).any()),
                           gradient(draft.weights))
    assert reached.pop("embed") is False
    assert all(jax.tree.leaves(reached)), reached


def enumerated(k, vocab=None, **sampling):
    policy = tiny.policy(3, seed=3)
    draft = make(policy, aux_depths=(0, 1), vocab=vocab, norm_before_residual=True)
    got, _ = enumerate_sequences(policy, draft, [1, 0, 1, 0], k=k, **sampling)
    return tiny.distance(got, tiny.autoregressive(policy, [1, 0, 1, 0], **sampling))


@pytest.mark.slow
def test_emitted_sequences_have_the_autoregressive_distribution():
    assert enumerated(1, [0, 2], max_new_tokens=2, stop_tokens=(2,)) < 5e-6
    assert enumerated(3, max_new_tokens=4, stop_tokens=(0,)) < 5e-6
    assert enumerated(2, [2, 1], max_new_tokens=3, stop_tokens=(), temperature=0.7) < 5e-6


def test_it_starts_from_the_policys_head_and_norm():
    policy = tiny.policy(11, layers=7, hidden=16, qkv_bias=True, qk_norm=True)
    draft = jspec.drafts.eagle3(policy, jax.random.key(0), vocab=[7, 2])
    assert draft.config.aux_depths == (2, 3, 4) == draft.drafter.features(draft.config)
    assert draft.state["vocab"].tolist() == [2, 7]
    np.testing.assert_array_equal(draft.weights["head"], policy.weights["embed"][jnp.array([2, 7])])
    np.testing.assert_array_equal(draft.weights["norm"], policy.weights["final_norm"])
    assert (not draft.config.block.qkv_bias and not draft.config.block.qk_norm
            and draft.config.block.num_layers == 1)
    assert draft.weights["layer"]["q"].shape == (16, 32) and "embed" not in draft.weights
    draft.check(policy)


@pytest.mark.parametrize("options, message", [
    (dict(aux_depths=(0, 1, 4)),
     r"depths \[0, 1, 4\] of a policy of 3 layers; they must be distinct and from 0"),
    (dict(aux_depths=(1, 1, 2)), r"depths \[1, 1, 2\] of a policy of 3 layers"),
    (dict(aux_depths=()), r"depths \[\] of a policy of 3 layers"),
    (dict(depths=0), "depths = 0 must be at least 1"),
    (dict(norm_before_fc=True, fc_norm=True), "norm_before_fc and fc_norm exclude each other"),
    (dict(layers=0), "eagle3 draft: layers = 0 must be at least 1"),
    (dict(layers=2, window=(1, 2, 3)),
     "window has 3 numbers, and the block has 2 layers; give one for each"),
    (dict(window=-1), "window = -1 must be at least 0"),
    (dict(qk_norm=1), "qk_norm = 1 must be True or False"),
    (dict(vocab=[1, 11]), "eagle3 draft: vocab holds token 11, outside the policy's 11"),
])
def test_it_refuses(policy, options, message):
    with pytest.raises(InputError, match=message):
        jspec.drafts.eagle3(policy, jax.random.key(0), **{"aux_depths": (0, 1, 3), **options})


@pytest.mark.parametrize("layers, depths",
                         [(1, (0, 1)), (4, (0, 2, 4)), (5, (0, 2, 5)), (30, (2, 15, 27))])
def test_the_default_depths_are_there(layers, depths):
    assert default_depths(layers) == depths
