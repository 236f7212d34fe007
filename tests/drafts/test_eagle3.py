"""EAGLE-3's cache follows the committed tokens, its loss trains what inference computes, and its variants differ."""

import dataclasses

import jax
import numpy as np
import pytest

import jspec
from jspec.drafts.parts import losses
from tests.drafts import recursive
from tests.speculate import tiny

VARIANTS = {
    "plain": {},
    "reduced": dict(vocab=[0, 2, 3, 5, 7, 10], norm_before_residual=True, norm_before_fc=True, own_embed=True),
    "output-normed": dict(fc_norm=True, norm_output=True),
}


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.2)


def make(policy, **options):
    return tiny.shaken(jspec.drafts.eagle3(policy, jax.random.key(1), **{"aux_depths": (0, 1, 3), **options}),
                       scale=0.15)


def other_block(policy, draft, **changes):
    """The draft with a block of other sizes than the policy's."""
    config = dataclasses.replace(draft.config, block=dataclasses.replace(draft.config.block, **changes))
    weights = jspec.model.init_weights(draft.module.specs(config), jax.random.key(2), 0.2)
    return tiny.shaken(draft.replace(config=config, weights=weights), scale=0.15)


@pytest.fixture(scope="module", params=[*VARIANTS, "own-sizes"])
def draft(policy, request):
    if request.param == "own-sizes":
        rope = jspec.model.RopeConfig(theta=300.0)
        return other_block(policy, make(policy), num_heads=6, num_kv_heads=3, head_dim=4, intermediate_size=24,
                           rope=rope, qkv_bias=True, qk_norm=True)
    return make(policy, **VARIANTS[request.param])


def test_state_depends_on_committed_tokens_only(policy, draft):
    recursive.check_state_depends_on_committed_tokens_only(policy, draft, without_entry=1)


def test_the_loss_unrolls_what_propose_computes(policy, draft):
    recursive.check_the_loss_unrolls_what_propose_computes(policy, draft, first=1)


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_the_loss_is_what_its_name_says_over_trained_tokens(policy, kind):
    draft = make(policy, **VARIANTS["reduced"])
    recursive.check_the_loss_is_what_its_name_says_over_trained_tokens(policy, draft, kind)


def test_a_trained_draft_is_accepted_more_often(policy):
    fresh = jspec.drafts.eagle3(policy, jax.random.key(1), aux_depths=(1, 2, 3), own_embed=True)
    trained = recursive.check_a_trained_draft_is_accepted_more_often(policy, fresh)
    np.testing.assert_array_equal(trained.weights["embed"], policy.weights["embed"])  # it is left as it is
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), fresh.weights, trained.weights)
    assert all(jax.tree.leaves({name: x for name, x in moved.items() if name != "embed"}))
