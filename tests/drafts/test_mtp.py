"""The head's cache follows the committed tokens, and its loss trains what inference computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts import base
from jspec.drafts.parts import losses
from jspec.model import logits, prefill, train_forward
from jspec.speculate import Sampling
from jspec.speculate.cycle import RULES, cycle
from pallas_kernels.noise import rejection_noise
from tests.speculate import tiny
from tests.speculate.enumeration import rollout_module

PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6], [4, 4, 4]]
K = 3


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=2, heads=4, kv_heads=2, hidden=32, scale=0.2)


# the conventions of a published layout
MIMO = {"hidden_first": True, "normed_trunk": False, "first": 1}


REDUCED = {"blocks": 2, "vocab": [0, 2, 3, 5, 7, 10]}


@pytest.fixture(scope="module", params=[({}, {}), ({"blocks": 3}, {}), (REDUCED, {}), ({}, MIMO)],
                ids=["recursive", "blocks", "two-blocks-reduced", "mimo"])
def draft(policy, request):
    options, conventions = request.param
    draft = tiny.shaken(jspec.drafts.mtp(policy, jax.random.key(1), depths=3, **options), scale=0.15)
    return draft.replace(config=dataclasses.replace(draft.config, **conventions))


@jax.jit
def trunk_states(policy, tokens, draft):
    return train_forward(policy, tokens, features=draft.module.features(draft.config))


def of_draft(draft, logits):
    """The columns of logits [..., V] that the draft draws from."""
    return logits[..., draft.state["vocab"]] if draft.state else logits


@jax.jit
def spied_loss(policy, draft, *args):
    """(log p, log q) of every depth that the loss compares, [B, T, Vd]."""
    seen, original = [], losses.divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "divergence", lambda p, q, kind: seen.append((p, q)) or original(p, q, kind))
        patch.setattr(losses, "sum_over_chunks", lambda fn, tree: fn(tree))
        draft.module.loss(policy, draft, *args, "kl")
    return seen


def test_state_depends_on_committed_tokens_only(policy, draft):
    """After several cycles the head's cache and state are what `start` makes of the committed tokens."""
    sampling = Sampling(max_new_tokens=16, stop_tokens=())
    batch = jspec.PromptBatch.from_tokens(PROMPTS, group_size=2, seed=3, buckets=(8,))
    ready = jspec.reshard(policy)
    prepared = draft.module.prepare(ready, draft)

    @jax.jit
    def advance(slots):
        noise = RULES["rejection"](jax.random.key_data(batch.key), slots.sequence_ids, slots.lengths, K)
        return cycle(ready, prepared, slots, noise, sampling=sampling, stop_tokens=(), k=K)

    slots = jax.jit(lambda: rollout_module.start(ready, prepared, batch, sampling, K))()
    for _ in range(4):
        slots = advance(slots)
    lengths = np.asarray(slots.lengths)
    assert len(set(lengths.tolist())) > 2  # rows have advanced by different steps
    # one token is pending: states reach to the last committed token, the policy's cache to the one before
    tokens = jnp.where(jnp.arange(slots.tokens.shape[1]) < slots.lengths[:, None], slots.tokens, 0)

    @jax.jit
    def scratch(tokens, lengths):
        trunk, cache = prefill(ready, tokens, tokens.shape[1], features=draft.module.features(draft.config))
        return draft.module.start(ready, prepared, base.Prefill(trunk, tokens, lengths), tokens.shape[1]), cache

    want, cache = scratch(tokens, slots.lengths)
    for got, expected in zip(slots.draft_state, want, strict=True):
        np.testing.assert_allclose(got["hidden"], expected["hidden"], atol=2e-5)
        for i, n in enumerate(lengths):
            for name in ("k", "v"):
                kept = n - draft.config.first  # a cache holds no positions before the first
                np.testing.assert_allclose(got[name][i, :, :kept], expected[name][i, :, :kept], atol=2e-5)
    for i, n in enumerate(lengths):
        for layer in range(2):
            np.testing.assert_allclose(slots.cache.k[layer][i, :, :n - 1], cache.k[layer][i, :, :n - 1], atol=2e-5)


def test_the_loss_unrolls_what_propose_computes(policy, draft):
    """Where the drafts happen to be the real tokens, log q at every depth is the same in both."""
    sequence = np.random.default_rng(0).integers(0, 11, 10).tolist()
    rows = []
    ready = jspec.reshard(policy)
    prepared = draft.module.prepare(ready, draft)
    for start in range(1, 7):  # committed tokens when the drafting begins
        rows.append(sequence[:start] + [0] * (10 - start))
    tokens, lengths = jnp.array(rows, jnp.int32), jnp.arange(1, 7)
    drawn = jnp.array([[*sequence, 0, 0][s:s + K] for s in range(1, 7)], jnp.int32)

    class Forced(base.Sampler):
        """Draws the sequence's own tokens."""

        def draw(self, logits, offset, vocab=None):
            return drawn[:, offset], super().draw(logits, offset, vocab)[1]

    @jax.jit
    def infer(ready, prepared):
        trunk, _ = prefill(ready, tokens, 16, features=draft.module.features(draft.config))
        state = draft.module.start(ready, prepared, base.Prefill(trunk, tokens, lengths), 16)
        noise = rejection_noise(jnp.zeros(2, jnp.uint32), lengths, lengths, K)
        sampler = Forced(noise, jnp.ones(6), None, 0, K)
        return draft.module.propose(ready, prepared, state, base.Committed(tokens, lengths), sampler)[0].log_q

    log_q = infer(ready, prepared)
    whole = jnp.array([sequence], jnp.int32)
    trunk = trunk_states(policy, whole, draft)
    pairs = spied_loss(policy, draft, trunk, whole, jnp.array([1]), jnp.ones((1, 9), bool), jnp.ones(1))
    target = of_draft(draft, jax.nn.log_softmax(logits(policy, trunk.hidden)))
    for depth, (log_p, head) in enumerate(pairs):
        np.testing.assert_allclose(log_p[0], target[0, :9], atol=1e-5)
        trained = head[0]
        for i, start in enumerate(range(1, 7)):
            # depth d drafts the token at start + d, from position start + d - 1
            np.testing.assert_allclose(trained[start + depth - 1], log_q[i, depth], atol=2e-5)


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_the_loss_is_what_its_name_says_over_trained_tokens(policy, draft, kind):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 11, (3, 9)), jnp.int32)
    start, mask = jnp.array([1, 3, 4]), jnp.asarray(rng.random((3, 5)) < 0.7)
    temperature = jnp.array([1.0, 0.5, 0.0])
    trunk = trunk_states(policy, tokens, draft)
    seen = spied_loss(policy, draft, trunk, tokens, start, mask, temperature)
    scale = np.array([1.0, 0.5, 1.0])[:, None, None]
    at = start[:, None] - 1 + np.arange(5)
    target = of_draft(draft, jax.nn.log_softmax(logits(policy, trunk.hidden) / scale))
    target = np.asarray(jnp.take_along_axis(target, at[..., None], axis=1, mode="clip"), np.float64)[np.asarray(mask)]
    log_q = [np.asarray(q, np.float64)[np.asarray(mask)] for _, q in seen]
    overlaps = [np.minimum(np.exp(target), np.exp(q)).sum(-1) for q in log_q]
    want = {"kl": [(np.exp(target) * (target - q)).sum() for q in log_q],
            "tv": [(1 - a).sum() for a in overlaps], "overlap": [-np.log(a).sum() for a in overlaps]}
    loss = jax.jit(draft.module.loss, static_argnums=7)
    total, count, metrics = loss(policy, draft, trunk, tokens, start, mask, temperature, kind)
    np.testing.assert_allclose(total, np.mean(want[kind]), rtol=1e-5)
    assert float(count) == int(mask.sum())
    np.testing.assert_allclose(metrics["overlap"], [a.sum() for a in overlaps], rtol=1e-5)
    assert loss(policy, draft, trunk, tokens, start, jnp.zeros_like(mask), temperature, kind)[0] == 0


def test_a_trained_head_is_accepted_more_often(policy):
    """A few steps of its own loss on the policy's own samples raise the acceptance that rollouts measure."""
    draft = jspec.drafts.mtp(policy, jax.random.key(1))
    batch = jspec.PromptBatch.from_tokens(PROMPTS, group_size=8, seed=0, buckets=(8,))
    sampling = Sampling(max_new_tokens=12, stop_tokens=())
    before = jspec.rollout(policy, draft, batch, sampling=sampling)
    start = jnp.repeat(batch.lengths, 8)
    prompt = jnp.repeat(batch.tokens, 8, axis=0)
    at = jnp.arange(20)
    response = jnp.take_along_axis(before.tokens, jnp.clip(at - start[:, None], 0, 11), axis=1)
    tokens = jnp.where(at < start[:, None], jnp.pad(prompt, ((0, 0), (0, 12))), response)
    trunk = trunk_states(policy, tokens, draft)

    @jax.jit
    def step(weights):
        def mean(w):
            made = draft.replace(weights=w)
            total, count, _ = draft.module.loss(policy, made, trunk, tokens, start, before.mask, 1.0, "overlap")
            return total / count

        return jax.tree.map(lambda w, g: w - 0.3 * g, weights, jax.grad(mean)(weights))

    weights = draft.weights
    for _ in range(150):
        weights = step(weights)
    after = jspec.rollout(policy, draft.replace(weights=weights), batch, sampling=sampling)
    assert float(after.acceptance_length) > float(before.acceptance_length) + 0.3
