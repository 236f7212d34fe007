"""The policy drafts for itself: what rounding costs, whose cache it is, and that nothing of it is
kept."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts import base
from jspec.model import Cache, prefill, verify
from jspec.model.linear import linear
from jspec.model.pool import cache_of, rows_of
from jspec.model.quantized import Quantized, dequantize, quantize
from jspec.speculate import Sampling
from jspec.speculate.cycle import committed, cycle
from jspec.speculate.rollout import start
from jspec.speculate.state import rows_in_slots
from jspec.speculate.types import NOISE
from tests.speculate import tiny
from tests.speculate.enumeration import enumerate_sequences
from tests.speculate.ties import assert_same, generated

MODULE = importlib.import_module("jspec.drafts.self")
PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6], [4, 4, 4]]
SAMPLING = Sampling(max_new_tokens=10, temperature=jnp.tile(jnp.array([1.0, 0.0]), 8),
                    stop_tokens=(3,))


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=2, heads=4, kv_heads=2, hidden=32, scale=0.25)


def pools(cache):
    """Keys of every layer, then values, by row."""
    return [rows_of(pool, cache.table) for pool in (*cache.k, *cache.v)]


def make_batch():
    return jspec.PromptBatch.from_tokens(PROMPTS, group_size=4, seed=0, buckets=(8,))


def run(policy, draft, k=3, rule="coupled"):
    return jspec.rollout(policy, draft, make_batch(), sampling=SAMPLING,
                         speculation=jspec.Speculation(k=k, rule=rule))


def acceptance(out):
    return float(out.stats.accepted.sum() / out.stats.drafted.sum())


@pytest.fixture(scope="module")
def plain(policy):
    return run(policy, None)


@pytest.mark.parametrize("options, least", [pytest.param({}, 0.9, marks=pytest.mark.slow),
                                            ({"bits": 4, "vocab": [0, 1, 2, 4, 5, 6, 7, 8]}, 0.2)])
def test_sampled_and_greedy_rows_equal_autoregressive(policy, plain, options, least):
    """Eight bits are nearly the policy; four, without a part of the vocabulary, are not, and it
    shows in speed only."""
    out = run(policy, jspec.drafts.self(policy, **options))
    assert_same(policy, make_batch(), SAMPLING, plain, out)
    assert acceptance(out) > least
    if options:
        assert acceptance(out) < 0.9  # the test above can fail


def test_without_rounding_its_drafts_are_the_policys_own_samples(policy, plain, monkeypatch):
    monkeypatch.setattr(MODULE, "quantize", lambda w, bits, *split: w)
    draft = jspec.drafts.self(policy)
    # a config of its own, so that no compiled rollout is taken for another
    config = dataclasses.replace(draft.config)
    object.__setattr__(config, "bits", 32)  # past the check: there are no such drafts
    out = run(policy, draft.replace(config=config))
    assert_same(policy, make_batch(), SAMPLING, plain, out)
    # every cycle but a row's last emits all k + 1
    np.testing.assert_array_equal(out.stats.cycles, [-(-len(row) // 4) for row in generated(out)])


@pytest.mark.slow
def test_it_follows_the_policy(policy):
    """One draft, made once: after an update of the policy it drafts for the new one."""
    draft = jspec.drafts.self(policy)
    other = tiny.policy(11, layers=2, heads=4, kv_heads=2, hidden=32, scale=0.25, seed=5)
    out = run(other, draft)
    assert generated(out) != generated(run(policy, draft)) and acceptance(out) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_policy_of_other_parts(bits):
    """Biases, norms of queries and keys, and an untied head, in bfloat16."""
    odd = tiny.policy(11, heads=4, kv_heads=2, hidden=32, scale=0.25, tie_embeddings=False,
                      qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True)
    odd = odd.replace(weights=jax.tree.map(lambda x: x + 0.05, odd.weights), dtype="bfloat16")
    ready = jspec.reshard(odd)
    weights = jax.jit(MODULE.prepare)(ready, jspec.drafts.self(odd, bits=bits)).weights
    rounded = {n for n, x in weights["layers"][0].items() if isinstance(x, Quantized)}
    assert rounded == {"qkv", "o", "gate_up", "down"} and isinstance(weights["table"], Quantized)
    error = (dequantize(weights["table"]).astype(jnp.float32)
             - ready.weights["head"].astype(jnp.float32))
    assert 0 < float(jnp.abs(error).max()) < (0.01 if bits == 8 else 0.12)
    assert (acceptance(run(odd, jspec.drafts.self(odd, bits=bits), rule="rejection"))
            > (0.85 if bits == 8 else 0.4))


def test_the_cache_is_the_policys_and_nothing_of_the_draft_stays(policy):
    """After several cycles the cache is what the policy makes of the committed tokens, and there is
    no state."""
    sampling = Sampling(max_new_tokens=16, stop_tokens=())
    batch = jspec.PromptBatch.from_tokens(PROMPTS, group_size=2, seed=3, buckets=(8,))
    ready, draft = jspec.reshard(policy), jspec.drafts.self(policy, bits=4)
    prepared = jax.jit(MODULE.prepare)(ready, draft)
    drafted = []

    @jax.jit
    def advance(state):
        at = rows_in_slots(state)
        noise = NOISE["rejection"](jax.random.key_data(batch.key), at.ids, at.lengths, 3)
        sampler = base.Sampler(noise, at.temperature, None, 0, 3)
        proposal, after = MODULE.propose(ready, prepared, state.draft, committed(state, at),
                                         sampler)
        assert after == base.DraftState({})
        new, *_ = cycle(ready, prepared, state, noise, sampling=sampling, stop_tokens=(), k=3)
        return new, proposal.cache, state.cache

    state = jax.jit(lambda: start(ready, prepared, batch, sampling, 3))()
    for _ in range(4):
        before = np.asarray(state.sequences.lengths)
        state, scratch, cache = advance(state)
        drafted.append(float(jnp.abs(scratch.k[1] - cache.k[1]).max()))
        at = np.arange(cache.capacity)
        held = ((at < before[:, None] - 1) | (at > before[:, None] + 1))[:, None, :, None]
        for old, new in zip(pools(cache), pools(scratch), strict=True):
            np.testing.assert_array_equal(np.where(held, old, 0), np.where(held, new, 0))
    assert min(drafted) > 0.1  # it did write
    of = state.sequences
    lengths = np.asarray(of.lengths)
    assert len(set(lengths.tolist())) > 2
    tokens = jnp.where(jnp.arange(of.tokens.shape[1]) < of.lengths[:, None], of.tokens, 0)
    want = jax.jit(lambda t: prefill(ready, t)[1])(tokens)
    want = [pair[i] for i in (0, 1) for pair in want]
    for got, expected in zip(pools(state.cache), want, strict=True):
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(got[i].swapaxes(0, 1)[:n - 1], expected[i, :n - 1],
                                       atol=2e-5)


def test_the_draft_attends_to_the_cache_of_the_policy(policy):
    """log q is that of the quantised weights after the exact keys and values, not after its own."""
    ready = jspec.reshard(policy)
    prepared = jax.jit(MODULE.prepare)(ready, jspec.drafts.self(policy, bits=4))
    tokens, lengths = jnp.array([[1, 2, 5, 7, 4, 0, 0, 0]], jnp.int32), jnp.array([5])

    @jax.jit
    def both(tokens, lengths):
        cache = cache_of(prefill(ready, tokens)[1], 16)
        noise = NOISE["rejection"](jnp.zeros(2, jnp.uint32), lengths, lengths, 2)
        sampler = base.Sampler(noise, jnp.ones(1), None, 0, 2)
        proposal, _ = MODULE.propose(ready, prepared, base.DraftState({}),
                                     base.Committed(tokens, lengths, cache), sampler)
        rounded = ready.replace(weights={**ready.weights, "layers": prepared.weights["layers"]})
        block = jnp.concatenate([tokens[:, 4:5], proposal.tokens[:, :1]], axis=1)
        out = []
        for exact in (cache, cache_of(prefill(rounded, tokens)[1], 16)):
            trunk, _ = verify(rounded, block, exact, lengths - 1)
            out.append(jax.nn.log_softmax(linear(trunk.hidden, prepared.weights["table"])))
        return proposal.log_q, *out

    log_q, shared, own = both(tokens, lengths)
    np.testing.assert_allclose(log_q, shared, atol=1e-5)
    assert float(jnp.abs(log_q - own).max()) > 1e-2


@pytest.mark.parametrize("bits, width, outliers",
                         [(8, 96, 0), (4, 96, 12), (4, 72, 9), (4, 37, 37), (4, 14, 2)])
def test_rounding_is_half_a_step(bits, width, outliers):
    """Of the largest weight that shares a scale; the product adds no more than the second digit's
    rounding."""
    rng = np.random.default_rng(bits)
    w = jnp.asarray(rng.standard_normal((2, 5, width)) * np.exp(rng.standard_normal((2, 5, 1))),
                    jnp.float32)
    made = jax.jit(quantize, static_argnums=1)(w, bits)
    assert made.array.qvalue.dtype == {8: jnp.int8, 4: jnp.int4}[bits]
    rounded = dequantize(made)
    chosen = np.zeros(width, bool) if bits == 8 else np.asarray(made.chosen).any(1).reshape(-1)
    assert chosen.sum() == outliers
    error = np.abs(np.asarray(rounded - w))
    for part, steps in ((chosen, 254), (~chosen, {8: 254, 4: 14}[bits])):
        if part.any():
            half = np.abs(np.asarray(w)[..., part]).max(-1, keepdims=True) / steps
            assert ((error[..., part] <= half * 1.0001).all() and (error[..., part] / half).max()
                    > 0.8)
    if bits == 4:
        largest = np.abs(np.asarray(w)).max((0, 1)).reshape(made.chosen.shape[0], -1)
        groups = chosen.reshape(largest.shape)
        assert all(x[c].min() >= x[~c].max(initial=0) for x, c in zip(largest, groups, strict=True))
    x = jnp.asarray(rng.standard_normal((3, 4, width)),
                    jnp.float32).at[0, 0, 0].set(50.0).at[1, 1].set(0.0)
    b = jnp.asarray(rng.standard_normal((2, 5)), jnp.float32)
    want = (np.einsum("abi,cdi->abcd", np.asarray(x, np.float64), np.asarray(rounded, np.float64))
            + np.asarray(b))
    digit = (np.abs(np.asarray(x)).max(-1)[..., None, None] / 64_516 * np.abs(np.asarray(rounded))
             .sum(-1))
    got = linear(x, made, b, jnp.float32)
    assert got.shape == (3, 4, 2, 5)
    assert (np.abs(got - want) <= digit + 2e-6 * np.abs(want).max()).all()
    np.testing.assert_array_equal(got[1, 1], b)  # zeros stay zero
    half = linear(x.astype(jnp.bfloat16), made)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want - np.asarray(b),
                               atol=0.02 * np.abs(want).max())


CASES = [(3, 1, 3, dict(max_new_tokens=3, stop_tokens=(2,))),
         (3, 2, 3, dict(max_new_tokens=3, stop_tokens=(2,))),
         (4, 1, 3, dict(max_new_tokens=3, stop_tokens=(1,), temperature=0.7, top_k=3,
                        min_new_tokens=2)),
         (3, 3, 4, dict(max_new_tokens=4, stop_tokens=(0,)))]


@pytest.mark.slow
@pytest.mark.parametrize("vocab, k, cycles, sampling", CASES)
def test_emitted_sequences_have_the_autoregressive_distribution(vocab, k, cycles, sampling):
    policy = tiny.policy(vocab, seed=vocab)
    got, seen = enumerate_sequences(policy, jspec.drafts.self(policy, bits=4), [1, 0, 1, 0], k=k,
                                    **sampling)
    want = tiny.autoregressive(policy, [1, 0, 1, 0], **sampling)
    assert seen >= cycles and set(got) <= set(want)
    assert tiny.distance(got, want) < 5e-6


def message(call):
    with pytest.raises(jspec.InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("options, words", [
    ({"bits": 16}, ("self draft", "bits = 16", "8, 4")), ({"bits": "8"}, ("bits = '8'", "8, 4")),
    ({"vocab": [1, 11]}, ("self draft", "token 11", "policy's 11"))])
def test_bad_options(policy, options, words):
    text = message(lambda: jspec.drafts.self(policy, **options))
    assert all(w in text for w in words), text


def test_more_drafts_than_the_cache_holds(policy):
    draft, empty = jspec.drafts.self(policy), (jnp.zeros((1, 2, 4, 8)),) * 2
    committed = base.Committed(jnp.zeros((1, 4), jnp.int32), jnp.array([1]),
                               Cache(empty, empty, jnp.zeros((1, 1), jnp.int32)))
    sampler = base.Sampler(None, jnp.ones(1), None, 0, 4)
    text = message(lambda: MODULE.propose(policy, draft, base.DraftState({}), committed, sampler))
    assert all(w in text for w in ("self draft", "k = 4", "4 positions")), text
