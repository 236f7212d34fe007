"""Losslessness as a fact: every way through chains of cycles, weighted, against the autoregressive distribution."""

import jax
import pytest

import jspec
from pallas_kernels.implementation import REFERENCE
from pallas_kernels.rejection_sampling import reference
from tests.pallas_kernels.interpreters import PLAIN
from tests.speculate import enumeration, planted, tiny
from tests.speculate.enumeration import enumerate_sequences

TOLERANCE = 5e-6  # probabilities of whole sequences: float32 sums in the code, float64 in the oracle; seen: 1e-6
PROMPT = [1, 0, 1, 0]


def make(draft, vocab, k):
    """(policy, draft) by the drafter's name."""
    policy = tiny.policy(vocab, seed=vocab)
    if draft == "mtp":
        return policy, tiny.shaken(jspec.drafts.mtp(policy, jax.random.key(k)))
    if draft == "ngram":
        return policy, jspec.drafts.ngram(policy)
    if draft == "suffix":
        made = jspec.drafts.suffix(policy, history_prompts=2, history_rows=2, history_tokens=3)
        return policy, made.module.remember(made, *tiny.finished([PROMPT], [[[1, 2, 0], [1, 0, 2]]]))
    return policy, tiny.table_draft(policy, sampled=draft == "table", seed=k)


def check(draft, vocab, k, cycles, kernels=REFERENCE, **sampling):
    policy, made = make(draft, vocab, k)
    policy = policy.replace(kernels=kernels)
    got, seen = enumerate_sequences(policy, made, PROMPT, k=k, **sampling)
    want = tiny.autoregressive(policy, PROMPT, **{**sampling, "top_p": sampling.get("top_p") or 1.0})
    assert seen >= cycles
    assert abs(sum(got.values()) - 1) < 1e-9
    assert set(got) <= set(want)
    assert tiny.distance(got, want) < TOLERANCE


CASES = [
    # drafter, vocabulary, k, cycles at least, sampling
    ("table", 3, 2, 3, dict(max_new_tokens=3, stop_tokens=(2,))),
    ("table", 4, 1, 3, dict(max_new_tokens=3, stop_tokens=(1,), temperature=0.7, min_new_tokens=2)),
    ("mtp", 3, 2, 3, dict(max_new_tokens=3, stop_tokens=(), temperature=0.7)),
    ("table", 4, 2, 2, dict(max_new_tokens=3, stop_tokens=(3,), top_k=3, top_p=0.8)),
    ("ngram", 4, 3, 3, dict(max_new_tokens=4, stop_tokens=(0,), min_new_tokens=1)),
    ("fixed", 5, 2, 3, dict(max_new_tokens=3, stop_tokens=(4, 2), temperature=0.7, top_k=4)),
    ("suffix", 3, 2, 3, dict(max_new_tokens=3, stop_tokens=(2,))),
]

LONG = [
    ("table", 3, 3, 4, dict(max_new_tokens=4, stop_tokens=(2,))),
    ("table", 3, 3, 3, dict(max_new_tokens=4, stop_tokens=(1,), temperature=0.7, top_p=0.9, min_new_tokens=2)),
    ("table", 5, 1, 4, dict(max_new_tokens=4, stop_tokens=(4,))),
    ("table", 5, 2, 3, dict(max_new_tokens=3, stop_tokens=(), top_k=3)),
    ("mtp", 3, 3, 4, dict(max_new_tokens=4, stop_tokens=(0,))),
    ("mtp", 4, 2, 4, dict(max_new_tokens=4, stop_tokens=(3,), min_new_tokens=1)),
    ("mtp", 4, 1, 4, dict(max_new_tokens=4, stop_tokens=(2,), temperature=0.7, top_k=3, top_p=0.9)),
    ("ngram", 5, 3, 4, dict(max_new_tokens=4, stop_tokens=(1,))),
    ("suffix", 4, 3, 4, dict(max_new_tokens=4, stop_tokens=(3,), temperature=0.7, min_new_tokens=1)),
    ("ngram", 3, 2, 5, dict(max_new_tokens=5, stop_tokens=(2,), temperature=0.7)),
    ("ngram", 3, 1, 4, dict(max_new_tokens=5, stop_tokens=(2,), min_new_tokens=3, top_p=0.7)),
    ("fixed", 4, 3, 4, dict(max_new_tokens=4, stop_tokens=(3,), top_k=3, top_p=0.9)),
]


@pytest.mark.parametrize("draft, vocab, k, cycles, sampling", CASES)
def test_emitted_sequences_have_the_autoregressive_distribution(draft, vocab, k, cycles, sampling):
    check(draft, vocab, k, cycles, **sampling)


@pytest.mark.slow
@pytest.mark.parametrize("draft, vocab, k, cycles, sampling", LONG)
def test_emitted_sequences_have_the_autoregressive_distribution_in_full(draft, vocab, k, cycles, sampling):
    check(draft, vocab, k, cycles, **sampling)


@pytest.mark.parametrize("draft, vocab, k, cycles, sampling",
                         [CASES[1], *(pytest.param(*case, marks=pytest.mark.slow) for case in (*CASES, *LONG)
                                      if not {"top_k", "top_p"} & set(case[-1]))])
def test_with_the_kernels_in(draft, vocab, k, cycles, sampling, monkeypatch):
    monkeypatch.setattr(enumeration, "ROWS", 128)  # an interpreter copies every row's cache for every row
    check(draft, vocab, k, cycles, PLAIN, **sampling)


@pytest.mark.parametrize("draft", ["table", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fixed", "mtp"))])
def test_vocabularies_of_several_blocks(draft, monkeypatch):
    """Both levels of the inverse transform count, and the last block is padded."""
    monkeypatch.setattr(reference, "VOCAB_BLOCK", 2)
    check(draft, 5, 1, 2, max_new_tokens=2, stop_tokens=(4,), top_p=0.95)


@planted.each_bug
def test_planted_bugs_are_seen(bug, monkeypatch):
    planted.plant(monkeypatch, bug)
    policy, draft = make("table", 3, 2)
    sampling = dict(max_new_tokens=3, stop_tokens=(2,))  # room for a bonus token after two drafts
    got, _ = enumerate_sequences(policy, draft, PROMPT, k=2, **sampling)
    assert tiny.distance(got, tiny.autoregressive(policy, PROMPT, **sampling)) > 1000 * TOLERANCE
