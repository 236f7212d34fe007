"""Every mistake gets one clear line that names the thing and the remedy."""

import jax
import jax.numpy as jnp
import pytest

import jspec
from tests.speculate import tiny

POLICY = tiny.policy(11, hidden=32)


def rollout(policy=POLICY, draft=None, prompts=((1, 2), (3,)), sampling=None, **options):
    batch = jspec.PromptBatch.from_tokens(prompts, group_size=2, seed=0, buckets=(8,))
    return jspec.rollout(policy, draft, batch,
                         sampling=sampling or jspec.Sampling(max_new_tokens=4), **options)


def message(call):
    with pytest.raises(jspec.InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def sampling(**options):
    return dict(sampling=jspec.Sampling(**{"max_new_tokens": 4, **options}))


@pytest.mark.parametrize("options, words", [
    (lambda: dict(speculation=jspec.Speculation(rule="greedy")),
     ("'greedy'", "rejection, block, coupled")),
    (lambda: dict(speculation=jspec.Speculation(k=-1)), ("k = -1", "0 turns speculation off")),
    (lambda: dict(speculation=jspec.Speculation(k=1.5)), ("k = 1.5", "a whole number")),
    (lambda: dict(speculation=jspec.Speculation(k=9000)),
     ("k = 9000", "below the model's 64 positions")),
    (lambda: dict(policy=None), ("params is a NoneType", "jspec.load")),
    (lambda: dict(draft=jspec.drafts.ngram),
     ("draft_params is a function", "jspec.drafts.ngram(params)")),
    (lambda: sampling(min_new_tokens=5), ("min_new_tokens", "5")),
    (lambda: sampling(max_new_tokens=0), ("max_new_tokens",)),
    (lambda: sampling(top_k=-2), ("top_k = -2", "0 turns it off")),
    (lambda: sampling(temperature=-0.5), ("temperature", "-0.5")),
    (lambda: sampling(temperature=float("nan")), ("temperature", "finite")),
    (lambda: sampling(temperature=jnp.ones(3)), ("temperature", "(3,)", "4 sequences")),
    (lambda: sampling(top_p=-0.1), ("top_p", "-0.1")),
    (lambda: sampling(max_new_tokens=100),
     ("prompt of 2 tokens", "max_new_tokens = 100", "64 positions")),
    (lambda: sampling(stop_tokens=(11,)), ("stop token 11", "vocabulary of 11")),
    (lambda: sampling(stop_tokens=tuple(range(11)), min_new_tokens=2),
     ("min_new_tokens = 2 forbids every token", "set it to 0")),
    (lambda: dict(policy=tiny.policy(11, hidden=32, tokenless=((4, 11),)), **sampling(
        stop_tokens=(0, 1, 2, 3), min_new_tokens=1)), ("min_new_tokens = 1 forbids every token",)),
    (lambda: dict(prompts=((1, 12), (3,))), ("token 12", "vocabulary of 11", "tokenizer")),
    (lambda: dict(prompts=((1, -4), (3,))), ("token -4", "vocabulary of 11")),
    (lambda: dict(draft=jspec.drafts.ngram(tiny.policy(12, hidden=32))),
     ("another policy", "vocab_size is 12", "11")),
    (lambda: dict(draft=jspec.drafts.mtp(tiny.policy(11, hidden=16), jax.random.key(0))),
     ("another policy", "hidden_size is 16", "32", "jspec.drafts.mtp")),
])
def test_rollout_refuses(options, words):
    text = message(lambda: rollout(**options()))
    assert all(w in text for w in words), text


@pytest.mark.parametrize("options, words", [
    (dict(prompts=[]), ("0 prompts",)),
    (dict(prompts=["1 2"]), ("lists of token ids, not text",)),
    (dict(prompts=[[1], []]), ("prompt 1 is empty",)),
    (dict(prompts=[[1], [2] * 9], buckets=(4, 8)), ("prompt 1 has 9 tokens", "8")),
    (dict(prompts=[[1]], group_size=0), ("group_size",)),
    (dict(prompts=[[1]], sequence_ids=[0]), ("2 distinct integers",)),
    (dict(prompts=[[1]], sequence_ids=[3, 3]), ("2 distinct integers",)),
])
def test_a_batch_refuses(options, words):
    text = message(lambda: jspec.PromptBatch.from_tokens(**{"group_size": 2, "seed": 0, **options}))
    assert all(w in text for w in words), text


def test_a_seed_is_required():
    with pytest.raises(TypeError, match="seed"):
        jspec.PromptBatch.from_tokens([[1]], group_size=1)


def test_a_batch():
    batch = jspec.PromptBatch.from_tokens([[1, 2, 3], [4]], group_size=3, seed=jax.random.key(5),
                                          buckets=(2, 4, 8), pad_token=7)
    assert (batch.tokens.tolist() == [[1, 2, 3, 7], [4, 7, 7, 7]] and batch.lengths.tolist()
            == [3, 1])
    assert batch.sequence_ids.tolist() == list(range(6)) and batch.group_size == 3
    assert (jax.random.key_data(batch.key) == jax.random.key_data(jax.random.key(5))).all()


def test_a_temperature_that_is_traced_is_not_judged():
    """Inside a jit values are unknown: only shapes are checked."""
    text = message(lambda: jax.jit(lambda t: rollout(**sampling(temperature=t))
                                   .tokens)(jnp.ones(5)))
    assert "4 sequences" in text


def test_drafts_refuse():
    assert "depths = 0" in message(lambda: jspec.drafts.mtp(POLICY, jax.random.key(0), depths=0))
    assert "max_ngram = 0" in message(lambda: jspec.drafts.ngram(POLICY, max_ngram=0))
