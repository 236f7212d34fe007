"""P-EAGLE's cache follows the committed tokens, its loss trains what inference computes in one
pass, and a draft never sees another one's token."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.errors import InputError
from tests.drafts import recursive
from tests.speculate import tiny

module = importlib.import_module("jspec.drafts.peagle")
VARIANTS = {"plain": dict(mask_token=10),
            "reduced": dict(vocab=[0, 2, 3, 5, 7, 10], norm_before_residual=True,
                            norm_before_fc=True, own_embed=False, window=3, mask_token=4),
            "layers": dict(layers=2, window=(0, 4), qk_norm=True, fc_norm=True, aux_depths=(1, 3))}


def variants(*quick):
    return pytest.mark.parametrize(
        "variant", [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in VARIANTS])


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.2)


def make(policy, **options):
    """A draft with noise on every weight."""
    options = {"aux_depths": (0, 1, 3), "depths": recursive.K, **options}
    return tiny.shaken(jspec.drafts.peagle(policy, jax.random.key(1), **options), scale=0.15)


@variants("layers")
def test_state_depends_on_committed_tokens_only(policy, variant):
    recursive.check_state_depends_on_committed_tokens_only(policy, make(policy,
                                                                        **VARIANTS[variant]),
                                                           without_entry=1)


@variants("reduced")
def test_the_loss_unrolls_what_propose_computes(policy, variant):
    recursive.check_the_loss_unrolls_what_propose_computes(
        policy, make(policy, **VARIANTS[variant]), first=1)


def _late(at, fn):
    """`fn` with its argument number `at` one larger."""
    return lambda *args, **options: fn(*args[:at], args[at] + 1, *args[at + 1:], **options)


@pytest.mark.slow
@pytest.mark.parametrize("name, at", [("start", 4), ("extend", 6)],
                         ids=["the first draft's state", "the entries behind it"])
def test_what_is_a_position_late_is_seen(policy, monkeypatch, name, at):
    monkeypatch.setattr(module.recursion, name, _late(at, getattr(module.recursion, name)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        recursive.check_the_loss_unrolls_what_propose_computes(
            policy, make(policy, **VARIANTS["reduced"]), first=1)


@pytest.mark.slow
def test_a_trained_draft_is_accepted_more_often(policy):
    fresh = jspec.drafts.peagle(policy, jax.random.key(1), aux_depths=(1, 2, 3))
    trained = recursive.check_a_trained_draft_is_accepted_more_often(policy, fresh)
    # its own embedding learns
    assert np.abs(trained.weights["embed"] - policy.weights["embed"]).max() > 1e-4


def test_training_reaches_every_weight(policy):
    draft = make(policy, depths=2, **VARIANTS["layers"])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 10)), jnp.int32)
    starts, length = [2, 3], 7
    batch = recursive.lesson(policy, draft, tokens, jnp.array(starts), jnp.ones((2, length), bool))
    gradient = jax.jit(jax.grad(lambda w: draft.drafter.loss(policy, draft.replace(weights=w),
                                                             batch, "kl")[0]))(draft.weights)
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(x).max() > 0, path
    # the rows of the mask and of tokens that were read: not the first, which has no entry, nor an
    # answer's last, which nothing follows
    rows = np.flatnonzero(np.abs(gradient["embed"]).max(axis=1))
    read = [tokens[i, 1:n + length - 1].tolist() for i, n in enumerate(starts)]
    assert set(rows) == {draft.config.mask_token}.union(*read)


def test_what_is_not_there_is_refused(policy):
    with pytest.raises(InputError, match="peagle draft: mask_token = 11 is outside the policy's "
                       "vocabulary of 11"):
        jspec.drafts.peagle(policy, 0, mask_token=11)
    with pytest.raises(InputError, match="peagle draft: norm_before_fc and fc_norm exclude"):
        jspec.drafts.peagle(policy, 0, norm_before_fc=True, fc_norm=True)
    with pytest.raises(InputError, match=r"peagle draft: auxiliary layers at depths \[1, 9\]"):
        jspec.drafts.peagle(policy, 0, aux_depths=(1, 9))
