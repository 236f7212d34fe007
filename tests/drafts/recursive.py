"""What must hold of every drafter that recurses over depths: checks of a (policy, draft) of
vocabulary 11."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts import base
from jspec.drafts.parts import losses
from jspec.model import logits, prefill, train_forward
from jspec.model.pool import rows_of
from jspec.rl.losses import token_logprobs
from jspec.speculate import Sampling
from jspec.speculate.cycle import cycle
from jspec.speculate.rollout import start
from jspec.speculate.state import rows_in_slots
from jspec.speculate.types import NOISE
from pallas_kernels.noise import rejection_noise

PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6], [4, 4, 4]]
K = 3

_forward = jax.jit(train_forward, static_argnames="depths")


def trunk_states(policy, draft, tokens):
    return _forward(policy, tokens, depths=draft.drafter.features(draft.config))


def of_draft(draft, logits):
    """The columns of logits [..., V] that the draft draws from."""
    return logits[..., draft.state["vocab"]] if draft.state else logits


def lesson(policy, draft, tokens, start, mask, temperature=1.0):
    """A DraftBatch of the policy's own states and log-probabilities."""
    made = base.DraftBatch(trunk_states(policy, draft, tokens), tokens, start, mask, None,
                           jnp.asarray(temperature))
    logprobs, *_ = token_logprobs(policy, made.predicting(made.trunk.hidden), made.response(),
                                 made.temperature)
    return made.replace(logprobs=logprobs)


@jax.jit
def spied_loss(policy, draft, batch):
    """(log p, log q) of every depth that the loss compares, [B, T, Vd]."""
    seen, original = [], losses.divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "divergence",
                      lambda p, q, kind: seen.append((p, q)) or original(p, q, kind))
        patch.setattr(losses, "sum_over_chunks", lambda fn, tree, size: fn(tree))
        draft.drafter.loss(policy, draft, batch, "kl")
    return seen


def check_state_depends_on_committed_tokens_only(policy, draft, without_entry=0, late=False,
                                                 of_rows=lambda rows: rows):
    """After several cycles caches and states are what `start` makes of the committed tokens.

    without_entry: how many tokens at the beginning have no entry in the draft's caches. late: in
    each cache one more than in the one before. of_rows: what of the rows' state is compared.
    """
    sampling = Sampling(max_new_tokens=16, stop_tokens=())
    batch = jspec.PromptBatch.from_tokens(PROMPTS, group_size=2, seed=3, buckets=(8,))
    ready = jspec.reshard(policy)
    prepared = draft.drafter.prepare(ready, draft)

    @jax.jit
    def advance(state):
        at = rows_in_slots(state)
        noise = NOISE["rejection"](jax.random.key_data(batch.key), at.ids, at.lengths, K)
        return cycle(ready, prepared, state, noise, sampling=sampling, stop_tokens=(), k=K)[0]

    state = jax.jit(lambda: start(ready, prepared, batch, sampling, K))()
    for _ in range(4):
        state = advance(state)
    of, table = state.sequences, state.cache.table
    lengths = np.asarray(of.lengths)
    assert len(set(lengths.tolist())) > 2  # rows have advanced by different steps
    # one token is pending: states reach to the last committed token, the policy's cache to the one
    # before
    tokens = jnp.where(jnp.arange(of.tokens.shape[1]) < of.lengths[:, None], of.tokens, 0)

    @jax.jit
    def scratch(tokens, lengths):
        trunk, key_values = prefill(ready, tokens, depths=draft.drafter.features(draft.config))
        return draft.drafter.start(ready, prepared,
                                   base.Prefill(trunk, tokens, lengths)), key_values

    (rows, of_draft), of_policy = scratch(tokens, of.lengths)
    for got, expected in zip(of_rows(state.draft.rows), of_rows(rows), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
    for cache, key_values, absent, more in ((state.draft.cache, of_draft, without_entry, late),
                                            (state.cache, of_policy, 1, 0)):
        layers = zip(zip(cache.k, cache.v, strict=True), key_values, strict=True)
        for layer, (pools, pair) in enumerate(layers):
            for pool, expected in zip(pools, pair, strict=True):
                got = rows_of(pool, table).swapaxes(1, 2)
                for i, n in enumerate(lengths - absent - more * layer):
                    np.testing.assert_allclose(got[i, :n], expected[i, :n], atol=2e-5)


def check_the_loss_unrolls_what_propose_computes(policy, draft, first=2):
    """Where the drafts happen to be the real tokens, log q at every depth is the same in both."""
    sequence = np.random.default_rng(0).integers(0, 11, 10).tolist()
    starts = range(first, 7)  # committed tokens when the drafting begins
    ready = jspec.reshard(policy)
    prepared = draft.drafter.prepare(ready, draft)
    tokens = jnp.array([sequence[:n] + [0] * (10 - n) for n in starts], jnp.int32)
    lengths = jnp.array(starts)
    drawn = jnp.array([[*sequence, 0, 0][n:n + K] for n in starts], jnp.int32)

    class Forced(base.Sampler):
        """Draws the sequence's own tokens."""

        def draw(self, logits, offset, vocab=None):
            return drawn[:, offset], super().draw(logits, offset, vocab)[1]

    @jax.jit
    def infer(ready, prepared):
        trunk, _ = prefill(ready, tokens, depths=draft.drafter.features(draft.config))
        state = draft.drafter.start(ready, prepared, base.Prefill(trunk, tokens, lengths))
        state = base.DraftState.of_prompts(*state, 16)
        noise = rejection_noise(jnp.zeros(2, jnp.uint32), lengths, lengths, K)
        sampler = Forced(noise, jnp.ones(len(starts)), None, 0, K)
        return draft.drafter.propose(ready, prepared, state, base.Committed(tokens, lengths),
                                     sampler)[0].log_q

    log_q = infer(ready, prepared)
    whole = jnp.array([sequence], jnp.int32)
    batch = lesson(policy, draft, whole, jnp.array([1]), jnp.ones((1, 9), bool))
    pairs = spied_loss(policy, draft, batch)
    target = of_draft(draft, jax.nn.log_softmax(logits(policy, batch.trunk.hidden)))
    assert len(pairs) == K
    for depth, (log_p, head) in enumerate(pairs):
        np.testing.assert_allclose(log_p[0], target[0, :9], atol=1e-5)
        trained = head[0]
        for i, n in enumerate(starts):
            # depth d drafts the token at n + d, from position n + d - 1
            np.testing.assert_allclose(trained[n + depth - 1], log_q[i, depth], atol=2e-5)


def check_the_loss_is_what_its_name_says_over_trained_tokens(policy, draft, kind):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 11, (3, 9)), jnp.int32)
    start, mask = jnp.array([1, 3, 4]), jnp.asarray(rng.random((3, 5)) < 0.7)
    temperature = jnp.array([1.0, 0.5, 0.0])
    batch = lesson(policy, draft, tokens, start, mask, temperature)
    seen = spied_loss(policy, draft, batch)
    scale = np.array([1.0, 0.5, 1.0])[:, None, None]
    at = start[:, None] - 1 + np.arange(5)
    target = of_draft(draft, jax.nn.log_softmax(logits(policy, batch.trunk.hidden) / scale))
    target = np.asarray(jnp.take_along_axis(target, at[..., None], axis=1, mode="clip"),
                        np.float64)[np.asarray(mask)]
    log_q = [np.asarray(q, np.float64)[np.asarray(mask)] for _, q in seen]
    overlaps = [np.minimum(np.exp(target), np.exp(q)).sum(-1) for q in log_q]
    best = target.argmax(-1)
    want = {"kl": [(np.exp(target) * (target - q)).sum() for q in log_q],
            "tv": [(1 - a).sum() for a in overlaps],
            "overlap": [-np.log(a).sum() for a in overlaps],
            "ce": [-q[np.arange(len(q)), best].sum() for q in log_q]}
    want["ce_tv"] = [0.1 * ce + 0.9 * tv for ce, tv in zip(want["ce"], want["tv"], strict=True)]
    loss = jax.jit(draft.drafter.loss, static_argnums=3)
    total, count, metrics = loss(policy, draft, batch, kind)
    np.testing.assert_allclose(total, np.mean(want[kind]), rtol=1e-5)
    assert float(count) == int(mask.sum())
    np.testing.assert_allclose(metrics["overlap"], [a.sum() for a in overlaps], rtol=1e-5)
    assert loss(policy, draft, batch.replace(mask=jnp.zeros_like(mask)), kind)[0] == 0


def check_a_trained_draft_is_accepted_more_often(policy, draft):
    """A few steps of its own loss on the policy's own samples raise the acceptance that rollouts
    measure. Returns the trained draft."""
    prompts = jspec.PromptBatch.from_tokens(PROMPTS, group_size=8, seed=0, buckets=(8,))
    sampling = Sampling(max_new_tokens=12, stop_tokens=())
    before = jspec.rollout(policy, draft, prompts, sampling=sampling)
    start = jnp.repeat(prompts.lengths, 8)
    prompt = jnp.repeat(prompts.tokens, 8, axis=0)
    at = jnp.arange(20)
    response = jnp.take_along_axis(before.tokens, jnp.clip(at - start[:, None], 0, 11), axis=1)
    tokens = jnp.where(at < start[:, None], jnp.pad(prompt, ((0, 0), (0, 12))), response)
    batch = lesson(policy, draft, tokens, start, before.mask)

    @jax.jit
    def step(weights):
        def mean(w):
            made = draft.replace(weights=w)
            total, count, _ = draft.drafter.loss(policy, made, batch, "overlap")
            return total / count

        return jax.tree.map(lambda w, g: w - 0.3 * g, weights, jax.grad(mean)(weights))

    weights = draft.weights
    for _ in range(150):
        weights = step(weights)
    trained = draft.replace(weights=weights)
    after = jspec.rollout(policy, trained, prompts, sampling=sampling)
    assert float(after.acceptance_length) > float(before.acceptance_length) + 0.3
    return trained
