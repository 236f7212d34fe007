"""The head's cache follows the committed tokens, and its loss trains what inference computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts import base
from jspec.drafts.parts import losses
from jspec.model import logits, prefill, train_forward
from jspec.rl.losses import token_logprobs
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


@pytest.fixture(scope="module", params=[{}, {"blocks": 3}, {"blocks": 2, "vocab": [0, 2, 3, 5, 7, 10]}],
                ids=["recursive", "blocks", "two-blocks-reduced"])
def draft(policy, request):
    return tiny.shaken(jspec.drafts.mtp(policy, jax.random.key(1), depths=3, **request.param), scale=0.15)


trunk_states = jax.jit(lambda policy, tokens: train_forward(policy, tokens))


def lesson(policy, tokens, start, mask, temperature=1.0):
    """A DraftBatch of the policy's own states and log-probabilities."""
    made = base.DraftBatch(trunk_states(policy, tokens), tokens, start, mask, None, jnp.asarray(temperature))
    logprobs, _ = token_logprobs(policy, made.predicting(made.trunk.hidden), made.response(), made.temperature)
    return made.replace(logprobs=logprobs)


def of_draft(draft, logits):
    """The columns of logits [..., V] that the draft draws from."""
    return logits[..., draft.state["vocab"]] if draft.state else logits


@jax.jit
def spied_loss(policy, draft, batch):
    """(log p, log q) of every depth that the loss compares, [B, T, Vd]."""
    seen, original = [], losses.divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "divergence", lambda p, q, kind: seen.append((p, q)) or original(p, q, kind))
        patch.setattr(losses, "sum_over_chunks", lambda fn, tree: fn(tree))
        draft.module.loss(policy, draft, batch, "kl")
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
        trunk, cache = prefill(ready, tokens, tokens.shape[1])
        return draft.module.start(ready, prepared, base.Prefill(trunk, tokens, lengths), tokens.shape[1]), cache

    want, cache = scratch(tokens, slots.lengths)
    for got, expected in zip(slots.draft_state, want, strict=True):
        np.testing.assert_allclose(got["hidden"], expected["hidden"], atol=2e-5)
        for i, n in enumerate(lengths):
            for name in ("k", "v"):
                np.testing.assert_allclose(got[name][i, :, :n], expected[name][i, :, :n], atol=2e-5)
    for i, n in enumerate(lengths):
        for layer in range(2):
            np.testing.assert_allclose(slots.cache.k[layer][i, :, :n - 1], cache.k[layer][i, :, :n - 1], atol=2e-5)


def test_the_loss_unrolls_what_propose_computes(policy, draft):
    """Where the drafts happen to be the real tokens, log q at every depth is the same in both."""
    sequence = np.random.default_rng(0).integers(0, 11, 10).tolist()
    rows = []
    ready = jspec.reshard(policy)
    prepared = draft.module.prepare(ready, draft)
    for start in range(2, 7):  # committed tokens when the drafting begins
        rows.append(sequence[:start] + [0] * (10 - start))
    tokens, lengths = jnp.array(rows, jnp.int32), jnp.arange(2, 7)
    drawn = jnp.array([[*sequence, 0, 0][s:s + K] for s in range(2, 7)], jnp.int32)

    class Forced(base.Sampler):
        """Draws the sequence's own tokens."""

        def draw(self, logits, offset, vocab=None):
            return drawn[:, offset], super().draw(logits, offset, vocab)[1]

    @jax.jit
    def infer(ready, prepared):
        trunk, _ = prefill(ready, tokens, 16)
        state = draft.module.start(ready, prepared, base.Prefill(trunk, tokens, lengths), 16)
        noise = rejection_noise(jnp.zeros(2, jnp.uint32), lengths, lengths, K)
        sampler = Forced(noise, jnp.ones(5), None, 0, K)
        return draft.module.propose(ready, prepared, state, base.Committed(tokens, lengths), sampler)[0].log_q

    log_q = infer(ready, prepared)
    whole = jnp.array([sequence], jnp.int32)
    batch = lesson(policy, whole, jnp.array([1]), jnp.ones((1, 9), bool))
    pairs = spied_loss(policy, draft, batch)
    target = of_draft(draft, jax.nn.log_softmax(logits(policy, batch.trunk.hidden)))
    for depth, (log_p, head) in enumerate(pairs):
        np.testing.assert_allclose(log_p[0], target[0, :9], atol=1e-5)
        trained = head[0]
        for i, start in enumerate(range(2, 7)):
            # depth d drafts the token at start + d, from position start + d - 1
            np.testing.assert_allclose(trained[start + depth - 1], log_q[i, depth], atol=2e-5)


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_the_loss_is_what_its_name_says_over_trained_tokens(policy, draft, kind):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 11, (3, 9)), jnp.int32)
    start, mask = jnp.array([1, 3, 4]), jnp.asarray(rng.random((3, 5)) < 0.7)
    temperature = jnp.array([1.0, 0.5, 0.0])
    batch = lesson(policy, tokens, start, mask, temperature)
    seen = spied_loss(policy, draft, batch)
    scale = np.array([1.0, 0.5, 1.0])[:, None, None]
    at = start[:, None] - 1 + np.arange(5)
    target = of_draft(draft, jax.nn.log_softmax(logits(policy, batch.trunk.hidden) / scale))
    target = np.asarray(jnp.take_along_axis(target, at[..., None], axis=1, mode="clip"), np.float64)[np.asarray(mask)]
    log_q = [np.asarray(q, np.float64)[np.asarray(mask)] for _, q in seen]
    overlaps = [np.minimum(np.exp(target), np.exp(q)).sum(-1) for q in log_q]
    want = {"kl": [(np.exp(target) * (target - q)).sum() for q in log_q],
            "tv": [(1 - a).sum() for a in overlaps], "overlap": [-np.log(a).sum() for a in overlaps]}
    loss = jax.jit(draft.module.loss, static_argnums=3)
    total, count, metrics = loss(policy, draft, batch, kind)
    np.testing.assert_allclose(total, np.mean(want[kind]), rtol=1e-5)
    assert float(count) == int(mask.sum())
    np.testing.assert_allclose(metrics["overlap"], [a.sum() for a in overlaps], rtol=1e-5)
    assert loss(policy, draft, batch.replace(mask=jnp.zeros_like(mask)), kind)[0] == 0


def test_a_trained_head_is_accepted_more_often(policy):
    """A few steps of its own loss on the policy's own samples raise the acceptance that rollouts measure."""
    draft = jspec.drafts.mtp(policy, jax.random.key(1))
    prompts = jspec.PromptBatch.from_tokens(PROMPTS, group_size=8, seed=0, buckets=(8,))
    sampling = Sampling(max_new_tokens=12, stop_tokens=())
    before = jspec.rollout(policy, draft, prompts, sampling=sampling)
    start = jnp.repeat(prompts.lengths, 8)
    prompt = jnp.repeat(prompts.tokens, 8, axis=0)
    at = jnp.arange(20)
    response = jnp.take_along_axis(before.tokens, jnp.clip(at - start[:, None], 0, 11), axis=1)
    tokens = jnp.where(at < start[:, None], jnp.pad(prompt, ((0, 0), (0, 12))), response)
    batch = lesson(policy, tokens, start, before.mask)

    @jax.jit
    def step(weights):
        def mean(w):
            made = draft.replace(weights=w)
            total, count, _ = draft.module.loss(policy, made, batch, "overlap")
            return total / count

        return jax.tree.map(lambda w, g: w - 0.3 * g, weights, jax.grad(mean)(weights))

    weights = draft.weights
    for _ in range(150):
        weights = step(weights)
    after = jspec.rollout(policy, draft.replace(weights=weights), prompts, sampling=sampling)
    assert float(after.acceptance_length) > float(before.acceptance_length) + 0.3
