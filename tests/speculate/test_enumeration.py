"""Losslessness as a fact: every way through chains of cycles, weighted, against the autoregressive
distribution."""

import numpy as np
import pytest

from pallas_kernels.implementation import REFERENCE
from pallas_kernels.rejection_sampling import reference
from tests.pallas_kernels import oracle
from tests.pallas_kernels.interpreters import PLAIN
from tests.speculate import drafters, enumeration, planted, tiny
from tests.speculate.enumeration import enumerate_sequences, tokens_a_cycle

pytestmark = pytest.mark.optimized

# probabilities of whole sequences: float32 in the code and in the oracle's scores; seen: 1e-6, with
# three layers 5e-6
TOLERANCE = 5e-6
PROMPT = [1, 0, 1, 0]
# the seed of a table with which all that the block rule computes counts, with a vocabulary of 3
SHARP = 12


def make(draft, vocab, k):
    """(policy, draft) by the drafter's name."""
    policy = drafters.policy(draft, vocab, seed=vocab)
    return policy, drafters.make(draft, policy, seed=SHARP if draft == "sharp" else k)


def check(draft, vocab, k, cycles, rule="rejection", kernels=REFERENCE, **sampling):
    policy, made = make(draft, vocab, k)
    policy = policy.replace(kernels=kernels)
    behaviour = {} if {"top_k", "top_p", "min_p"} & set(sampling) else None
    got, seen = enumerate_sequences(policy, made, PROMPT, k=k, rule=rule, behaviour=behaviour,
                                    **sampling)
    want = tiny.autoregressive(policy, PROMPT,
                               **{**sampling, "top_p": sampling.get("top_p") or 1.0})
    assert seen >= cycles
    assert abs(sum(got.values()) - 1) < 1e-9
    assert set(got) <= set(want)
    tolerance = TOLERANCE * (2 if policy.config.num_layers > 1 else 1)
    assert tiny.distance(got, want) < tolerance
    if behaviour is not None:
        check_behaviour(behaviour, want, 10 * tolerance)


def check_behaviour(behaviour, want, tolerance):
    """Behaviour log-probabilities add up to what each sequence is drawn with; those of the whole
    distribution do not, or this would show nothing."""
    sums = np.array([behaviour[key] for key in want if key in behaviour])
    exact = np.log([want[key] for key in want if key in behaviour])
    assert np.abs(sums[:, 0] - exact).max() < tolerance
    assert np.abs(sums[:, 1] - exact).max() > 0.01


CASES = [
    # drafter, vocabulary, k, cycles at least, sampling
    ("mtp", 3, 2, 3, dict(max_new_tokens=3, stop_tokens=(), temperature=0.7)),
    ("table", 4, 2, 2, dict(max_new_tokens=3, stop_tokens=(3,), top_k=3, top_p=0.8)),
    ("ngram", 4, 3, 3, dict(max_new_tokens=4, stop_tokens=(0,), min_new_tokens=1)),
]

BLOCK = [
    ("sharp", 3, 2, 3, dict(max_new_tokens=3, stop_tokens=(2,))),
    ("fixed", 4, 2, 2, dict(max_new_tokens=3, stop_tokens=(3,), temperature=0.7, top_k=3, top_p=0.9,
                            min_p=0.3, min_new_tokens=2)),
]

LONG = [
    ("table", 3, 2, 3, dict(max_new_tokens=3, stop_tokens=(2,))),
    ("fixed", 5, 2, 3, dict(max_new_tokens=3, stop_tokens=(4, 2), temperature=0.7, min_p=0.2)),
    ("suffix", 3, 2, 3, dict(max_new_tokens=3, stop_tokens=(2,))),
    ("table", 4, 1, 3, dict(max_new_tokens=3, stop_tokens=(1,), temperature=0.7, min_new_tokens=2)),
    ("table", 3, 3, 4, dict(max_new_tokens=4, stop_tokens=(2,))),
    ("table", 3, 3, 3,
     dict(max_new_tokens=4, stop_tokens=(1,), temperature=0.7, top_p=0.9, min_new_tokens=2)),
    ("table", 5, 1, 4, dict(max_new_tokens=4, stop_tokens=(4,))),
    ("table", 5, 2, 3, dict(max_new_tokens=3, stop_tokens=(), top_k=3)),
    ("mtp", 3, 3, 4, dict(max_new_tokens=4, stop_tokens=(0,))),
    ("mtp", 4, 2, 4, dict(max_new_tokens=4, stop_tokens=(3,), min_new_tokens=1)),
    ("mtp", 4, 1, 4, dict(max_new_tokens=4, stop_tokens=(2,), temperature=0.7, top_k=3, top_p=0.9)),
    ("ngram", 5, 3, 4, dict(max_new_tokens=4, stop_tokens=(1,))),
    ("suffix", 4, 3, 4,
     dict(max_new_tokens=4, stop_tokens=(3,), temperature=0.7, min_new_tokens=1)),
    ("ngram", 3, 2, 5, dict(max_new_tokens=5, stop_tokens=(2,), temperature=0.7)),
    ("ngram", 3, 1, 4, dict(max_new_tokens=5, stop_tokens=(2,), min_new_tokens=3, top_p=0.7)),
    ("fixed", 4, 3, 4, dict(max_new_tokens=4, stop_tokens=(3,), top_k=3, top_p=0.9)),
]


@pytest.mark.parametrize("draft, vocab, k, cycles, sampling", CASES)
def test_emitted_sequences_have_the_autoregressive_distribution(draft, vocab, k, cycles, sampling):
    check(draft, vocab, k, cycles, **sampling)


@pytest.mark.parametrize("draft, vocab, k, cycles, sampling", BLOCK)
def test_block_emits_the_autoregressive_distribution(draft, vocab, k, cycles, sampling):
    check(draft, vocab, k, cycles, "block", **sampling)


QUICK = ("suffix",)


@pytest.mark.parametrize("draft", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*drafters.NAMES, *drafters.SPARSE)])
def test_block_with_every_drafter(draft, monkeypatch):
    monkeypatch.setattr(enumeration, "ROWS", 256)
    check(draft, 3, 2, 2, "block", max_new_tokens=2, stop_tokens=(2,))


@pytest.mark.slow
@pytest.mark.parametrize("rule", enumeration.KINDS)
@pytest.mark.parametrize("draft", drafters.NAMES)
def test_every_drafter_in_full(draft, rule):
    check(draft, 3, 3, 3, rule, max_new_tokens=4, stop_tokens=(2,), min_new_tokens=1)
    # two cycles: of the few tokens that are left, a draft may have one accepted in every chain
    check(draft, 4, 2, 2, rule, max_new_tokens=3, stop_tokens=(3,), temperature=0.7, top_k=3,
          top_p=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("rule, draft, vocab, k, cycles, sampling",
                         [("rejection", *case)
                          for case in LONG] + [("block", *case) for case in (*CASES, *LONG)])
def test_emitted_sequences_have_the_autoregressive_distribution_in_full(rule, draft, vocab, k,
                                                                        cycles, sampling):
    check(draft, vocab, k, cycles, rule, **sampling)


@pytest.mark.parametrize("rule, draft, vocab, k, cycles, sampling", [
    ("rejection", *CASES[0]),
    *(pytest.param(rule, *case, marks=pytest.mark.slow) for rule in ("rejection", "block")
      for case in (*CASES, *LONG) if not {"top_k", "top_p"} & set(case[-1]))])
def test_with_the_kernels_in(rule, draft, vocab, k, cycles, sampling, monkeypatch):
    # an interpreter copies every row's cache for every row
    monkeypatch.setattr(enumeration, "ROWS", 128)
    check(draft, vocab, k, cycles, rule, PLAIN, **sampling)


@pytest.mark.parametrize("draft", ["table", *(pytest.param(x, marks=pytest.mark.slow)
                                              for x in ("fixed", "mtp"))])
def test_vocabularies_of_several_blocks(draft, monkeypatch):
    """Both levels of the inverse transform count, and the last block is padded."""
    monkeypatch.setattr(reference, "VOCAB_BLOCK", 2)
    check(draft, 5, 1, 2, max_new_tokens=2, stop_tokens=(4,), top_p=0.95)


@planted.each_bug
def test_planted_bugs_are_seen(bug, monkeypatch):
    rule = planted.plant(monkeypatch, bug)
    policy, draft = make(planted.DRAFT[rule], 3, 2)
    sampling = dict(max_new_tokens=3, stop_tokens=(2,))  # room for a bonus token after two drafts
    got, _ = enumerate_sequences(policy, draft, PROMPT, k=2, rule=rule, **sampling)
    assert tiny.distance(got, tiny.autoregressive(policy, PROMPT, **sampling)) > 1000 * TOLERANCE


@pytest.mark.parametrize("rule", ["block", pytest.param("rejection", marks=pytest.mark.slow)])
def test_noise_kept_across_cycles_is_seen(rule):
    """Block has looked at what comes after the accepted drafts, and the next cycle must not see it
    again. Rejection has not: it would be exact even so, which shows that the enumeration of kept
    noise is right."""
    policy, draft = make("table", 3, 2)
    sampling = dict(max_new_tokens=2, stop_tokens=(2,))
    got, _ = enumerate_sequences(policy, draft, PROMPT, k=2, rule=rule, keep_noise=True, **sampling)
    assert abs(sum(got.values()) - 1) < 1e-9
    off = tiny.distance(got, tiny.autoregressive(policy, PROMPT, **sampling))
    assert off > 1000 * TOLERANCE if rule == "block" else off < TOLERANCE


def expected_tokens(policy, draft, k, rule):
    """Tokens that the first cycle emits, in expectation over a table's drafts: 1 + sum of the
    chances that i drafts or more are accepted."""
    scores = tiny.prefix_logits(policy, PROMPT, k)
    table = np.exp(oracle.log_softmax(np.asarray(draft.weights["table"], np.float64)))

    def walk(drafts, mass, p, q):
        if len(drafts) == k:
            ratios = [min(1.0, p[j][y] / q[j][y]) for j, y in enumerate(drafts)]
            # which no p after the last draft enters
            w = oracle.block_tests(np.array([*p, p[-1]]), drafts, q)[0]
            return mass * ((np.cumprod(ratios) if rule == "rejection" else w[1:]).sum())
        row = table[drafts[-1] if drafts else PROMPT[-1]]
        after = oracle.process(scores[drafts])
        return sum(walk((*drafts, y), mass * row[y], [*p, after], [*q, row])
                   for y in range(len(row)))

    return 1 + walk((), 1.0, [], [])


@pytest.mark.slow
@pytest.mark.parametrize("vocab, k", [(3, 2), (4, 3)])
def test_block_accepts_more_than_rejection(vocab, k):
    policy, draft = make("table", vocab, k)
    length = {}
    for rule in ("rejection", "block"):
        length[rule] = tokens_a_cycle(policy, draft, PROMPT, k=k, rule=rule)
        assert abs(length[rule] - expected_tokens(policy, draft, k, rule)) < 10 * TOLERANCE
    assert length["block"] > length["rejection"] + 0.01
