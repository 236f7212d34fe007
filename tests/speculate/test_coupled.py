"""`coupled` is autoregressive decoding with the same seed, token for token, whatever the draft, k,
batch or slot."""

import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from tests.speculate import drafters, tiny
from tests.speculate.ties import TIE, assert_same, deciding_margin, generated

SAMPLING = jspec.Sampling(max_new_tokens=12, temperature=1.0, stop_tokens=(3,))
PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6, 7, 6], [4, 4, 4]]


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.25)


def make_batch(prompts=PROMPTS, group_size=8, seed=0, **options):
    return jspec.PromptBatch.from_tokens(prompts, group_size=group_size, seed=seed, buckets=(8,),
                                         **options)


@pytest.fixture(scope="module")
def run(policy):
    def rollout(draft, batch, k=3, sampling=SAMPLING):
        made = None if draft is None else drafters.make(draft, policy, seed=1, scale=0.05)
        return jspec.rollout(policy, made, batch, sampling=sampling,
                             speculation=jspec.Speculation(k=k, rule="coupled"))

    return rollout


slow = pytest.mark.slow
QUICK = ("mtp", "eagle3", "dspark", "ngram")
DRAFTS = [pytest.param(draft, k, marks=() if k == 2 and draft in QUICK else slow)
          for draft in drafters.NAMES for k in (1, 2, 3, 5, 7)]


@pytest.mark.parametrize("draft, k", DRAFTS)
def test_equals_autoregressive(run, policy, draft, k):
    for seed in range(2):
        batch = make_batch(seed=seed)
        plain, fast = run(None, batch), run(draft, batch, k)
        assert_same(policy, batch, SAMPLING, plain, fast)
        # the sequences of a group are not one
        assert len({tuple(x) for x in generated(plain)}) > 24
        assert float(fast.acceptance_length) > 1.05 > float(plain.acceptance_length) == 1
        np.testing.assert_array_equal(plain.finished, fast.finished)


@slow
@pytest.mark.parametrize("draft", drafters.SPARSE)
def test_a_sparse_policy_is_itself_with_every_drafter(draft):
    policy = drafters.policy(draft, 11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.25)
    batch = make_batch()
    plain, fast = (jspec.rollout(policy, made, batch, sampling=SAMPLING,
                                 speculation=jspec.Speculation(k=2, rule="coupled"))
                   for made in (None, drafters.make(draft, policy, seed=1, scale=0.05)))
    assert_same(policy, batch, SAMPLING, plain, fast)
    assert float(fast.acceptance_length) > 1.05


@slow
@pytest.mark.parametrize("draft, k", [("mtp", 2), ("ngram", 3)])
def test_equals_autoregressive_when_truncated(run, policy, draft, k):
    sampling = jspec.Sampling(max_new_tokens=12, min_new_tokens=5, top_k=6, stop_tokens=(3, 1),
                              temperature=jnp.tile(jnp.array([1.0, 0.0, 0.7, 1.3]), 8), top_p=0.9)
    batch = make_batch()
    assert_same(policy, batch, sampling, run(None, batch, sampling=sampling),
                run(draft, batch, k, sampling=sampling))


@pytest.mark.parametrize("draft, k", [("ngram", 3), pytest.param("mtp", 3, marks=slow)])
def test_slot_order_and_company_do_not_matter(run, draft, k):
    prompts = [p for p in PROMPTS for _ in range(8)]
    reference = generated(run(draft, make_batch(prompts, 1), k))
    order = np.random.default_rng(0).permutation(len(prompts))
    moved = run(draft, make_batch([prompts[i] for i in order], 1, sequence_ids=order), k)
    assert generated(moved) == [reference[i] for i in order]
    # half of the rows are replaced by others
    company = [p if i % 2 else [9, 8] for i, p in enumerate(prompts)]
    mixed = run(draft, make_batch(company, 1,
                                  sequence_ids=[i if i % 2 else 100 + i for i in range(32)]), k)
    assert generated(mixed)[1::2] == reference[1::2]
    # shared by a group or computed apart, a prompt is the same prompt; and alone it is as well, but
    # for rounding
    assert generated(run(draft, make_batch(), k)) == reference
    alone = run(draft, make_batch(prompts[19:20], 1, sequence_ids=[19]), k)
    assert generated(alone) == [reference[19]]


def test_another_seed_or_sequence_is_other_noise(run):
    a, b = (generated(run("ngram", make_batch(seed=s), 3)) for s in (0, 1))
    c = generated(run("ngram", make_batch(sequence_ids=range(32, 64)), 3))
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 8
    assert sum(x == y for x, y in zip(a, c, strict=True)) < 8


def test_the_helper_sees_what_is_no_tie(run, policy):
    """Tokens that differ by more than rounding are told apart from ties."""
    batch = make_batch()
    out = run(None, batch)
    row = int(np.argmax(out.lengths))
    wrong = out.replace(tokens=out.tokens.at[row, 2].set((out.tokens[row, 2] + 1) % 11))
    with pytest.raises(AssertionError, match=f"row {row} differs at token 2"):
        assert_same(policy, batch, SAMPLING, out, wrong)
    first = generated(out)[row]
    assert deciding_margin(policy, batch, SAMPLING, row, first[:2], (first[2],)) < TIE
