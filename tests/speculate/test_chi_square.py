"""The distribution of what `jspec.rollout` itself emits, noise and loop included."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jspec
from jspec.choices import RULES
from jspec.speculate.types import NOISE
from pallas_kernels import noise
from tests.speculate import drafters, planted, tiny

pytestmark = pytest.mark.optimized

PROMPT = [1, 0, 1, 0]
SAMPLES, FEW = 200_000, 40_000
REFUSE = 1e-4  # fixed seeds: a correct program passes for good
PLANTED = 1e-12
# the seed of a table with which all that the block rule computes counts, with a vocabulary of 4
SHARP = 4


def p_value(observed, want):
    """Chi-square of a Counter of sequences against their probabilities; rare sequences are one
    bin."""
    total = sum(observed.values())
    assert set(observed) <= set(want)
    common = [x for x in want if want[x] * total >= 5]
    seen = [observed[x] for x in common]
    expected = [want[x] * total for x in common]
    rest = total - sum(expected)
    if rest > 1e-6 * total:
        seen, expected = [*seen, total - sum(seen)], [*expected, rest]
    return stats.chisquare(seen, np.array(expected) * (sum(seen) / sum(expected))).pvalue


def rows(draft, rule, *, k=2, samples=SAMPLES, seed=0, kernels="auto", **sampling):
    policy = drafters.policy(draft, 4, seed=2, scale=0.2, stop_tokens=(3,))
    made, emitted = drafters.make(draft, policy, seed=SHARP if draft == "sharp" else 3,
                                  scale=0.2), []
    # an interpreter copies every row's cache for every row
    size = samples if kernels == "auto" else 500
    for part in range(samples // size):
        batch = jspec.PromptBatch.from_tokens([PROMPT], group_size=size, seed=seed + part,
                                              buckets=(4,))
        out = jspec.rollout(policy, made, batch, sampling=jspec.Sampling(**sampling),
                            speculation=jspec.Speculation(k=k, rule=rule, kernels=kernels))
        emitted += tiny.sequences(out)
    return emitted, policy


def check(draft, rule, *, k=2, samples=SAMPLES, kernels="auto", **sampling):
    emitted, policy = rows(draft, rule, k=k, samples=samples, kernels=kernels, **sampling)
    want = tiny.autoregressive(policy, PROMPT, stop_tokens=(3,), **sampling)
    assert p_value(Counter(emitted), want) > REFUSE


CASES = [*((draft, "rejection", 2, {}) for draft in drafters.NAMES), ("sharp", "block", 2, {}),
         ("ngram", "coupled", 1, {"temperature": 0.7, "top_k": 3})]
LONG = [*CASES, *((draft, "rejection", 2, {}) for draft in drafters.SPARSE),
        *((draft, rule, 3, {"min_new_tokens": 1}) for draft in drafters.NAMES for rule in RULES),
        ("table", "rejection", 1, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}),
        ("table", "rejection", 3, {}),
        ("table", "block", 2, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}),
        ("mtp", "rejection", 3, {"top_k": 3, "min_new_tokens": 1}),
        ("mtp", "block", 3, {"top_k": 3, "min_new_tokens": 2}),
        ("ngram", "rejection", 2, {"top_p": 0.8}), ("ngram", "coupled", 3, {"temperature": 0.7}),
        ("mtp", "coupled", 2, {"top_k": 3, "top_p": 0.9})]


QUICK = ("sharp",)


@pytest.mark.parametrize("draft, rule, k, sampling", [
    pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in CASES])
def test_rollout(draft, rule, k, sampling):
    check(draft, rule, k=k, samples=FEW, max_new_tokens=3, **sampling)


@pytest.mark.slow
@pytest.mark.parametrize("draft, rule, k, sampling", LONG)
def test_rollout_in_full(draft, rule, k, sampling):
    check(draft, rule, k=k, max_new_tokens=4, **sampling)


@pytest.mark.slow
@pytest.mark.parametrize("draft, rule, k, samples, sampling", [
    ("mtp", "rejection", 2, FEW // 8, {}), ("table", "rejection", 3, FEW, {"temperature": 0.7}),
    ("table", "block", 3, FEW, {"temperature": 0.7}), ("ngram", "block", 3, FEW, {}),
    ("mtp-reduced", "block", 2, FEW, {"min_new_tokens": 1}),
    ("ngram", "rejection", 3, FEW, {"min_new_tokens": 2}),
    ("mtp", "coupled", 2, FEW, {"min_new_tokens": 1})])
def test_rollout_with_the_kernels_in(draft, rule, k, samples, sampling):
    check(draft, rule, k=k, samples=samples, kernels="pallas", max_new_tokens=3, **sampling)


@pytest.mark.slow
def test_rows_of_different_temperature_and_top_p():
    kinds = [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7), (0.0, 1.0)]
    samples = FEW // 2 * len(kinds)
    temperature, top_p = (jnp.tile(jnp.array(x), samples // len(kinds))
                          for x in zip(*kinds, strict=True))
    emitted, policy = rows("table", "rejection", samples=samples, max_new_tokens=3,
                           temperature=temperature, top_p=top_p)
    for i, (t, p) in enumerate(kinds):
        want = tiny.autoregressive(policy, PROMPT, max_new_tokens=3, stop_tokens=(3,),
                                   temperature=t, top_p=p)
        seen = Counter(emitted[i::len(kinds)])
        if len(want) == 1:
            assert set(seen) == set(want)
        else:
            assert p_value(seen, want) > REFUSE


@pytest.fixture
def retraced():
    """Compiled rollouts hold the code as it was: nothing may be reused over a planted bug."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def planted_p_value(rule="rejection"):
    emitted, policy = rows(planted.DRAFT[rule], rule, samples=FEW, max_new_tokens=3)
    want = tiny.autoregressive(policy, PROMPT, max_new_tokens=3, stop_tokens=(3,))
    return p_value(Counter(emitted), want)


@planted.each_bug
def test_planted_bugs_are_seen(bug, monkeypatch, retraced):
    rule = planted.plant(monkeypatch, bug)
    assert planted_p_value(rule) < PLANTED


@pytest.mark.slow
def test_noise_that_outlives_its_cycle_is_seen(monkeypatch, retraced):
    """The enumeration cannot see this one: noise is the cycle's argument there."""
    def stale(key, sequence_ids, committed, k):
        return noise.rejection_noise(key, sequence_ids, jnp.zeros_like(committed), k)

    monkeypatch.setitem(NOISE, "rejection", stale)
    assert planted_p_value() < PLANTED


@pytest.mark.slow
def test_block_noise_that_is_keyed_by_position_is_seen(monkeypatch, retraced):
    """Fresh in every position, and yet what two cycles draw for the same position is the same."""
    def by_position(key, sequence_ids, committed, k):
        alone = [noise.block_noise(key, sequence_ids, committed + j, 1) for j in range(k)]
        draft, accept = (jnp.concatenate([getattr(x, name) for x in alone], 1)
                         for name in ("draft", "accept"))
        return noise.block_noise(key, sequence_ids, committed,
                                 k).replace(draft=draft, accept=accept)

    monkeypatch.setitem(NOISE, "block", by_position)
    assert planted_p_value("block") < PLANTED
