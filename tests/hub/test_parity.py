"""Logits and log-probabilities against what transformers gave: the golden files and the recorded
greedy decoding."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec import hub
from jspec.model.config import RopeConfig
from jspec.model.forward import logits, train_forward

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/expected.npz"))


score = jax.jit(lambda policy, tokens: logits(policy, train_forward(policy, tokens).hidden))


def golden_logits(policy, tokens):
    return np.asarray(score(policy, jnp.asarray(tokens)))


def expected(case):
    with np.load(GOLDEN / case / "expected.npz") as data:
        return data["tokens"], data["logits"]


def test_the_golden_files_cover_every_family_and_rope_scaling():
    configs = [hub.read_config(str(GOLDEN / case)) for case in CASES]
    assert {c.family for c in configs} == {"llama", "qwen2", "qwen3", "qwen3_moe"}
    assert {c.rope.scaling for c in configs} == {"default", "linear", "llama3", "yarn"}
    assert {c.tie_embeddings for c in configs} == {True, False}
    assert ({(c.qkv_bias, c.qk_norm) for c in configs}
            == {(False, False), (True, False), (False, True)})
    assert ({(c.experts.renormalize, c.experts.dense_layers) for c in configs if c.experts}
            == {(True, ()), (False, (0, 2, 3, 4))})


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case):
    tokens, want = expected(case)
    got = golden_logits(hub.load(str(GOLDEN / case), dtype="float32"), tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case",
                         [c for c in CASES if "linear" in c or "llama3" in c or "yarn" in c])
def test_the_golden_files_would_show_a_scaling_that_is_not_applied(case):
    tokens, want = expected(case)
    policy = hub.load(str(GOLDEN / case), dtype="float32")
    plain = dataclasses.replace(policy.config, rope=RopeConfig(theta=policy.config.rope.theta))
    assert np.abs(golden_logits(policy.replace(config=plain), tokens) - want).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_moe_mixed_stacked", "qwen3_moe"])
def test_greedy_rollouts_of_experts_are_those_of_transformers(case):
    """Token for token, with drafts, of which the verifier may keep what it likes."""
    with np.load(GOLDEN / case / "expected.npz") as data:
        tokens, greedy = data["tokens"][0], data["greedy"]
    policy = hub.load(str(GOLDEN / case), dtype="float32")
    prompt = tokens[:tokens.size - greedy.size]
    batch = jspec.PromptBatch.from_tokens([prompt.tolist()], group_size=1, seed=0)
    sampling = jspec.Sampling(max_new_tokens=greedy.size, temperature=0.0, stop_tokens=())
    out = jspec.rollout(policy, jspec.drafts.ngram(policy), batch, sampling=sampling,
                        speculation=jspec.Speculation(k=2))
    np.testing.assert_array_equal(out.tokens[0], greedy)


def test_smollm2_gives_the_recorded_log_probabilities(smollm2):
    for entry in json.loads((GOLDEN / "smollm2_greedy.json").read_text()):
        n, tokens = len(entry["prompt_tokens"]), entry["prompt_tokens"] + entry["greedy_tokens"]
        row = jnp.asarray([tokens + [0] * (96 - len(tokens))])
        scores = np.asarray(jax.nn.log_softmax(score(smollm2, row)))[0, n - 1:len(tokens) - 1]
        got = scores[np.arange(len(scores)), entry["greedy_tokens"]]
        np.testing.assert_allclose(got, entry["logprobs"], rtol=0, atol=1e-3)
