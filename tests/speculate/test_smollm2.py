"""A real model, float32: greedy decoding as transformers recorded it, and `coupled` as
autoregressive decoding. By default of its first layers alone: what costs is compiling 30."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from tests.speculate.ties import TIE, assert_same, generated

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_greedy.json").read_text())
PROMPTS = [x["prompt_tokens"] for x in RECORDED]
FEW = 3
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def decode(smollm2):
    return decoding(smollm2)


def decoding(policy):
    drafts = {None: None, "ngram": jspec.drafts.ngram(policy),
              "mtp": jspec.drafts.mtp(policy, jax.random.key(0))}

    def run(draft, k, temperature, *, rows=(0, 1, 2, 3), seed=0, tokens=20, rule="coupled"):
        # temperature by row is a leaf: greedy and sampled decoding are one program
        sampling = jspec.Sampling(max_new_tokens=tokens,
                                  temperature=jnp.full(len(rows), temperature))
        batch = jspec.PromptBatch.from_tokens([PROMPTS[i] for i in rows], group_size=1, seed=seed,
                                              buckets=(48,), sequence_ids=rows)
        out = jspec.rollout(policy, drafts[draft], batch, sampling=sampling,
                            speculation=jspec.Speculation(k=k, rule=rule))
        return out, batch, sampling

    return run


def check_greedy(out, rows, tokens):
    for i, row in enumerate(rows):
        want = RECORDED[row]
        expected, got = want["greedy_tokens"][:tokens], generated(out)[i]
        # the file gives each token's margin; up to the first that is a tie, all must agree
        sure = next((j for j, gap in enumerate(want["top2_logit_gap"][:tokens]) if gap < TIE),
                    len(expected))
        assert sure == len(expected)  # none of the recorded margins is one
        assert got == expected
        np.testing.assert_allclose(out.logprobs[i, :len(got)], want["logprobs"][:tokens], atol=1e-3)
        assert (bool(out.finished[i])
                == (len(want["greedy_tokens"]) <= tokens and want["greedy_tokens"][-1] == 2))


@slow
@pytest.mark.parametrize("draft, k", [(None, 0), ("ngram", 3), ("mtp", 3)])
def test_greedy_decoding(decode, draft, k):
    out, *_ = decode(draft, k, 0.0)
    check_greedy(out, range(4), 20)
    if draft == "ngram":
        assert float(out.acceptance_length) > 1.02


def check_coupled(policy, decode, draft, seed):
    plain, batch, sampling = decode(None, 0, 0.8, seed=seed)
    fast, *_ = decode(draft, 3, 0.8, seed=seed)
    assert_same(policy, batch, sampling, plain, fast)
    assert len(set(map(tuple, generated(plain)))) == 4


def test_coupled_equals_autoregressive(smollm2):
    layers = jax.tree.map(lambda x: x[:FEW], smollm2.weights["layers"])
    policy = smollm2.replace(weights={**smollm2.weights, "layers": layers},
                             config=dataclasses.replace(smollm2.config, num_layers=FEW))
    check_coupled(policy, decoding(policy), "ngram", 0)


@slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("draft", ["ngram", "mtp"])
def test_coupled_equals_autoregressive_in_full(decode, smollm2, draft, seed):
    check_coupled(smollm2, decode, draft, seed)


@slow
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("draft", [None, "ngram", "mtp"])
def test_greedy_decoding_in_full(decode, draft, k):
    if draft is None and k > 1:
        pytest.skip("there is no k without a draft")
    out, *_ = decode(draft, k, 0.0, tokens=48)
    check_greedy(out, range(4), 48)
    for row in range(4):
        out, *_ = decode(draft, k, 0.0, tokens=48, rows=[row])
        check_greedy(out, [row], 48)


@slow
@pytest.mark.parametrize("draft", ["ngram", "mtp"])
def test_greedy_decoding_under_the_rejection_rule(decode, draft):
    out, *_ = decode(draft, 3, 0.0, rule="rejection")
    check_greedy(out, range(4), 20)
