"""The head's cache follows the committed tokens, and its loss trains what inference computes."""

import dataclasses

import jax
import pytest

import jspec
from jspec.choices import DRAFT_LOSSES
from tests.drafts import recursive
from tests.speculate import tiny


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=2, heads=4, kv_heads=2, hidden=32, scale=0.2)


# the conventions of a published layout
MIMO = {"hidden_first": True, "normed_trunk": False, "first": 1}
STEPS = {"normed_trunk": False, "first": 1, "shared": True, "blocks": 2}


REDUCED = {"blocks": 2, "vocab": [0, 2, 3, 5, 7, 10]}


VARIANTS = {"recursive": ({}, {}), "blocks": ({"blocks": 3}, {}), "mimo": ({}, MIMO),
            "two-blocks-reduced": (REDUCED, {}), "steps": ({}, STEPS)}
QUICK = ("recursive",)


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS])
def draft(policy, request):
    return make(policy, request.param)


def make(policy, variant):
    options, conventions = VARIANTS[variant]
    draft = tiny.shaken(jspec.drafts.mtp(policy, jax.random.key(1), depths=3, **options),
                        scale=0.15)
    return draft.replace(config=dataclasses.replace(draft.config, **conventions))


def test_state_depends_on_committed_tokens_only(policy, draft):
    recursive.check_state_depends_on_committed_tokens_only(policy, draft,
                                                           without_entry=draft.config.first,
                                                           late=draft.config.late)


def test_the_loss_unrolls_what_propose_computes(policy, draft):
    recursive.check_the_loss_unrolls_what_propose_computes(policy, draft)


@pytest.mark.parametrize("variant", [
    x if x == "two-blocks-reduced" else pytest.param(x, marks=pytest.mark.slow) for x in VARIANTS])
@pytest.mark.parametrize("kind", DRAFT_LOSSES)
def test_the_loss_is_what_its_name_says_over_trained_tokens(policy, variant, kind):
    draft = make(policy, variant)
    recursive.check_the_loss_is_what_its_name_says_over_trained_tokens(policy, draft, kind)


@pytest.mark.slow  # eagle3 shows it of the same mechanism
def test_a_trained_head_is_accepted_more_often(policy):
    recursive.check_a_trained_draft_is_accepted_more_often(
        policy, jspec.drafts.mtp(policy, jax.random.key(1)))
