"""All ways through the transformer are one function. (Families and rope scalings: golden files in
tests/hub.)"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.model import (
    attention,
    chunks,
    linear,
    logits,
    prefill,
    prompt_forward,
    response_forward,
    train_forward,
    verify,
)
from jspec.model.pool import cache_of
from tests.speculate import tiny

KINDS = {
    "llama": dict(),
    "qwen2": dict(family="qwen2", qkv_bias=True, tie_embeddings=False),
    "qwen3": dict(family="qwen3", qk_norm=True),
    "biases": dict(qkv_bias=True, out_bias=True, mlp_bias=True),
}


def make(kind, **options):
    policy = tiny.policy(13, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.2, **KINDS[kind],
                         **options)
    # biases and norms begin as zeros and ones, which would hide them
    leaves, tree = jax.tree.flatten(policy.weights)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    weights = tree.unflatten([x + 0.05 * jax.random.normal(k, x.shape)
                              for x, k in zip(leaves, keys, strict=True)])
    return policy.replace(weights=weights)


@pytest.mark.parametrize("kind", KINDS)
def test_train_prefill_and_verify_agree(kind):
    policy = make(kind)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (3, 12)), jnp.int32)
    lengths = jnp.array([4, 1, 6])

    @jax.jit
    def ways(policy, tokens, lengths):
        ready = jspec.reshard(policy)
        whole = train_forward(policy, tokens, depths=(0, 2, 3))
        first, key_values = prefill(ready, tokens[:, :6], depths=(0, 2, 3))
        cache = cache_of(key_values, 16)
        # the prompt is right-padded: what lies beyond each length is garbage that the next write
        # replaces
        a, cache = verify(ready, jnp.take_along_axis(tokens, lengths[:, None] + jnp.arange(4), 1),
                          cache, lengths)
        b, _ = verify(ready, jnp.take_along_axis(tokens, lengths[:, None] + 2 + jnp.arange(4), 1),
                      cache, lengths + 2, depths=(0, 2, 3))
        return whole, first, a, b

    whole, first, a, b = ways(policy, tokens, lengths)
    np.testing.assert_allclose(first.hidden, whole.hidden[:, :6], atol=1e-5)
    for i, n in enumerate([4, 1, 6]):
        np.testing.assert_allclose(a.hidden[i], whole.hidden[i, n:n + 4], atol=1e-5)
        np.testing.assert_allclose(b.hidden[i], whole.hidden[i, n + 2:n + 6], atol=1e-5)
        for f, g in zip(whole.features, b.features, strict=True):
            np.testing.assert_allclose(g[i], f[i, n + 2:n + 6], atol=1e-5)
    np.testing.assert_allclose(whole.features[0], policy.weights["embed"][tokens], atol=1e-6)


def test_padding_influences_nothing_before_it():
    policy = make("llama")
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 13, (2, 8)), jnp.int32)
    score = jax.jit(lambda p, t: train_forward(p, t).hidden)
    np.testing.assert_array_equal(score(policy, tokens)[:, :5],
                                  score(policy, tokens.at[:, 5:].set(0))[:, :5])


def test_remat_changes_no_value_and_no_gradient():
    policy = make("llama")
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 13, (2, 8)), jnp.int32)

    def loss(weights, remat):
        p = policy.replace(weights=weights)
        return jnp.square(logits(p, train_forward(p, tokens, remat=remat).hidden)).sum()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    whole, sizes = grad(policy.weights, False), {}
    for remat, off in ((False, 0.0), ("dots", 1e-4), ("dots_no_batch", 1e-4), ("full", 1e-4)):
        jax.tree.map(lambda a, b, off=off: np.testing.assert_allclose(a, b, rtol=1e-5, atol=off),
                     whole, grad(policy.weights, remat))
        sizes[remat] = kept(loss, policy.weights, remat)
    assert sizes[False] > sizes["dots"] > sizes["dots_no_batch"] > sizes["full"]
    assert kept(loss, policy.weights, True) == sizes["full"]


def kept(loss, weights, remat):
    """Bytes that the forward pass keeps for the backward one."""
    _, pull = jax.eval_shape(lambda w: jax.vjp(lambda w: loss(w, remat), w), weights)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))


def test_bfloat16_computes_over_float32_masters():
    policy = make("llama").replace(dtype="bfloat16")
    tokens = jnp.zeros((1, 4), jnp.int32)
    ready = jspec.reshard(policy)
    assert {x.dtype for x in jax.tree.leaves(policy.weights)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(ready.weights)} == {jnp.dtype("bfloat16")}
    hidden = jax.jit(lambda p: train_forward(p, tokens).hidden)(policy)
    assert hidden.dtype == jnp.bfloat16 and logits(policy, hidden).dtype == jnp.float32
    exact = jax.jit(lambda p: train_forward(p, tokens).hidden)(policy.replace(dtype="float32"))
    assert 0 < np.abs(np.asarray(hidden, np.float32) - exact).max() < 0.1


def test_attention_in_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 11, h, 8)), jnp.float32) for h in (4, 2, 2))
    blocked = attention.causal_attention(q, k, v)
    np.testing.assert_allclose(blocked, jax.nn.dot_product_attention(q, k, v, is_causal=True),
                               atol=1e-6)


@pytest.mark.parametrize("blocks", [False, True])
def test_responses_continue_prompts_that_are_computed_once(blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    policy, rng = make("qwen3"), np.random.default_rng(5)
    prompts, lengths = jnp.asarray(rng.integers(0, 13, (2, 6)), jnp.int32), jnp.array([6, 2])
    responses = jnp.asarray(rng.integers(0, 13, (6, 5)), jnp.int32)
    own = jnp.array([0, 1, 1, 0, 0, 1])  # in any order

    @jax.jit
    def forward(policy):
        trunk, keys_values = prompt_forward(policy, prompts, depths=(0, 2, 3))
        return trunk, response_forward(policy, responses, lengths[own], keys_values, own[None],
                                       depths=(0, 2, 3))

    prompt, response = forward(policy)
    for i, row in enumerate(responses):
        n = int(lengths[own[i]])
        whole = train_forward(policy, jnp.concatenate([prompts[own[i], :n], row])[None],
                              depths=(0, 2, 3))
        for both, a, b in zip(*map(jax.tree.leaves, (whole, prompt, response)), strict=True):
            np.testing.assert_allclose(a[own[i], :n], both[0, :n], atol=1e-5)
            np.testing.assert_allclose(b[i], both[0, n:], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_products_by_core_are_products(rows, monkeypatch):
    monkeypatch.setattr(linear.os, "cpu_count", lambda: 3)
    rng = np.random.default_rng(6)
    x, w, b = (jnp.asarray(rng.normal(size=s), jnp.float32)
               for s in ((rows, 1, 7), (2, 3, 257, 7), (2, 3, 257)))

    def plain(x, w, b):
        return jnp.einsum("bti,xyoi->btxyo", x, w, precision="highest") + b

    def of(product):
        gradients = jax.grad(lambda *arguments: jnp.sin(product(*arguments)).sum(), (0, 1, 2))
        return jax.jit(lambda *arguments: (product(*arguments), gradients(*arguments)))(x, w, b)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), of(linear.linear),
                 of(plain))


@pytest.mark.parametrize("chunk", [1, 6, 7, 100])
def test_sums_over_chunks(chunk):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 9, 3)), jnp.float32)
    mask = jnp.arange(9)[None] < jnp.array([9, 4])[:, None]

    def total(x):
        return chunks.sum_over_chunks(lambda c: jnp.sum(jnp.square(c[0]), where=c[1][..., None]),
                                      (x, mask), chunk)

    np.testing.assert_allclose(total(x), jnp.sum(jnp.square(x), where=mask[..., None]), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(x), jnp.where(mask[..., None], 2 * x, 0), rtol=1e-6)


def test_ids_without_a_token_are_no_part_of_the_policy():
    policy = make("llama")
    lacking = policy.replace(config=dataclasses.replace(policy.config,
                                                        tokenless=((2, 4), (11, 13))))
    hidden = jax.random.normal(jax.random.key(0), (3, 32))
    got, whole = np.asarray(logits(lacking, hidden)), np.asarray(logits(policy, hidden))
    has = np.isin(np.arange(13), [2, 3, 11, 12], invert=True)
    np.testing.assert_array_equal(got, np.where(has, whole, -np.inf))


@pytest.mark.parametrize("tokenless, message", [
    ([3, 5], r"must be ranges .* not \[3, 5\]"),
    ([[3]], r"\[3\] is none after 0"),
    ([[5, 3]], r"\[5, 3\] is none after 0"),
    ([[3, 5], [4, 6]], r"\[4, 6\] is none after 5"),
    ([[11, 14]], r"\[11, 14\] is outside the vocabulary of 13"),
    ([[0, 13]], "leaves no id of the vocabulary"),
])
def test_tokenless_ranges_that_are_none_are_refused(tokenless, message):
    with pytest.raises(jspec.InputError, match=message):
        tiny.config(13, tokenless=tokenless)


def test_tokenless_as_json_has_it():
    assert (hash(tiny.config(13, tokenless=[[11, 13]]))
            == hash(tiny.config(13, tokenless=((11, 13),))))
