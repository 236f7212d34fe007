"""Logits and log-probabilities against what transformers gave: the golden files and the recorded
greedy decoding."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    assert {c.family for c in configs} == {"llama", "qwen2", "qwen3"}
    assert {c.rope.scaling for c in configs} == {"default", "linear", "llama3", "yarn"}
    assert {c.tie_embeddings for c in configs} == {True, False}
    assert ({(c.qkv_bias, c.qk_norm) for c in configs}
            == {(False, False), (True, False), (False, True)})


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


def test_smollm2_gives_the_recorded_log_probabilities(smollm2):
    for entry in json.loads((GOLDEN / "smollm2_greedy.json").read_text()):
        n, tokens = len(entry["prompt_tokens"]), entry["prompt_tokens"] + entry["greedy_tokens"]
        row = jnp.asarray([tokens + [0] * (96 - len(tokens))])
        scores = np.asarray(jax.nn.log_softmax(score(smollm2, row)))[0, n - 1:len(tokens) - 1]
        got = scores[np.arange(len(scores)), entry["greedy_tokens"]]
        np.testing.assert_allclose(got, entry["logprobs"], rtol=0, atol=1e-3)
