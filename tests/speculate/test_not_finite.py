"""A draft that is not finite decides nothing: what is emitted is autoregressive decoding's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts.base import all_finite, check_finite, largest
from pallas_kernels.rejection_sampling import reference
from tests.speculate import drafters, enumeration, tiny
from tests.speculate.ties import generated

slow = pytest.mark.slow
PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6, 7, 6], [4, 4, 4]]
GROUP = 4
# mixed rows: greedy ones, and a minimum length
SAMPLING = jspec.Sampling(max_new_tokens=10, temperature=jnp.tile(jnp.array([1.0, 0.0, 0.7, 1.3]),
                                                                  4), min_new_tokens=2)
WITH_WEIGHTS = [name for name in drafters.NAMES
                if drafters.VARIANTS.get(name, (name,))[0] in ("mtp", "eagle3", "peagle",
                                                            "draft_model")]


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, scale=0.25, stop_tokens=(3,))


def spoiled(tree, value):
    """Every weight with one entry that is no finite number."""
    return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value)
                        if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def run(policy, draft, rule, kernels="reference", k=2, sampling=SAMPLING):
    batch = jspec.PromptBatch.from_tokens(PROMPTS, group_size=GROUP, seed=0, buckets=(8,))
    out = jspec.rollout(policy, draft, batch, sampling=sampling,
                        speculation=jspec.Speculation(k=k, rule=rule, kernels=kernels))
    assert np.isfinite(out.logprobs).all() and np.isfinite(out.entropy).all()
    return out


@pytest.mark.parametrize("name, rule, kernels", [
    ("mtp-reduced", "rejection", "reference"),
    *(pytest.param(name, rule, kernels, marks=slow) for name in WITH_WEIGHTS
      for rule in ("rejection", "block", "coupled") for kernels in ("reference", "pallas"))])
def test_the_answer_is_autoregressive_sampling(policy, name, rule, kernels):
    """The noise of a residual does not know k: with every draft refused, even the tokens are those
    without a draft."""
    draft = drafters.make(name, policy, seed=1, scale=0.05)
    plain = generated(run(policy, None, rule))
    # a head that leaves out position 0 drafts evenly, which is finite, after a prompt of one token
    refused = [row for row in range(len(plain)) if not getattr(draft.config, "late", False)
               or len(PROMPTS[row // GROUP]) > 1]
    for value in (np.nan, np.inf, -np.inf):
        out = generated(run(policy, draft.replace(weights=spoiled(draft.weights, value)), rule,
                            kernels))
        assert [out[row] for row in refused] == [plain[row] for row in refused]
    assert run(policy, draft, rule, kernels).stats.accepted.any()


@pytest.mark.parametrize("rule", ["block",
                                  *(pytest.param(x, marks=slow) for x in ("rejection", "coupled"))])
def test_self_leaves_nothing_in_the_policys_cache(policy, rule):
    """It writes its keys and values there: what is NaN must be overwritten before it is read."""
    draft = jspec.drafts.self(policy)

    def spoiled(*args):
        made = draft.drafter.prepare(*args)
        # the integers cannot be NaN, but their scales can
        return made.replace(weights=jax.tree.map(
            lambda x: x * jnp.nan if x.dtype == jnp.float32 and x.ndim > 1 else x, made.weights))

    out = run(policy, draft.replace(drafter=draft.drafter._replace(prepare=spoiled)), rule)
    assert generated(out) == generated(run(policy, None, rule))
    assert rule == "coupled" or not out.stats.accepted.any()


SHORT, PROMPT = dict(max_new_tokens=2, stop_tokens=()), [1, 0]


def enumerated(rule, monkeypatch):
    """How far the sequences of a draft that is finite after some tokens only are from
    autoregressive ones."""
    monkeypatch.setattr(enumeration, "ROWS", 128)
    policy = drafters.policy("table", 2, seed=3)
    draft = drafters.make("table", policy, seed=2)
    draft = draft.replace(weights={"table": draft.weights["table"].at[1].set(jnp.nan)})
    got, _ = enumeration.enumerate_sequences(policy, draft, PROMPT, k=2, rule=rule, **SHORT)
    return tiny.distance(got, tiny.autoregressive(policy, PROMPT, **SHORT))


@pytest.mark.parametrize("rule", ["block", pytest.param("rejection", marks=slow)])
def test_exact_where_some_drafts_are_not_finite(rule, monkeypatch):
    assert enumerated(rule, monkeypatch) < 1e-5


@pytest.mark.parametrize("rule", ["rejection", pytest.param("block", marks=slow)])
def test_drafts_that_are_accepted_all_the_same_are_seen(rule, monkeypatch):
    """The twin: with NaN counted as accepted the same enumeration fails."""
    ratio = reference.log_ratio
    monkeypatch.setattr(reference, "log_ratio",
                        lambda p, q: jnp.where(jnp.isfinite(q), ratio(p, q), jnp.inf))
    assert enumerated(rule, monkeypatch) > 0.01


@pytest.mark.parametrize("shape", [(7,), (64, 128), (3, 33, 97)])
def test_one_nan_in_a_large_array_is_seen(shape):
    """A plain maximum loses it on a CPU (findings/max_loses_nan_cpu.sh)."""
    for at in np.random.default_rng(0).integers(np.prod(shape), size=8):
        weights = {"w": np.ones(shape, np.float32)}
        weights["w"].reshape(-1)[at] = np.nan
        assert np.isnan(largest(weights))
        with pytest.raises(jspec.InputError, match="a draft is not finite: its weight w holds NaN"):
            check_finite("a draft", weights, "take another")
    assert largest({"w": np.full(shape, -2.0), "ids": np.arange(3)}) == 2


def test_which_weights_are_finite(policy):
    assert (all_finite({"a": jnp.ones(3), "ids": jnp.arange(3), "half": jnp.ones(2, jnp.bfloat16)})
            and all_finite({}))
    assert not all_finite({"a": jnp.ones(3), "b": jnp.array([1.0, jnp.inf])})
    draft = jspec.drafts.mtp(policy, jax.random.key(0))
    draft.check_finite("somewhere")
    block = draft.weights["blocks"][0]
    bad = draft.replace(weights={"blocks": ({**block,
                                             "proj": block["proj"].at[0, 0].set(jnp.nan)},)})
    with pytest.raises(
        jspec.InputError,
        match=r"the mtp draft of somewhere is not finite: its weight blocks\.0\.proj "
                                "holds NaN or infinity; take a checkpoint from before"):
        bad.check_finite("somewhere")
    large = draft.replace(weights={"blocks": ({**block,
                                               "proj": block["proj"].at[0, 0].set(-1e30)},)})
    with pytest.raises(jspec.InputError, match=r"has run away: its weight blocks\.0\.proj holds "
                       r"numbers up to 1e\+30;"):
        large.check_finite("somewhere")
