"""Drafts of one pass: the cache holds what is committed, the loss trains what inference computes,
and q is what was drawn from. Each fault that others shipped here is planted once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts import base
from jspec.drafts.parts import anchored, one_pass
from jspec.errors import InputError
from jspec.model import RopeConfig, init_weights, prefill
from pallas_kernels.noise import rejection_noise
from tests.drafts import recursive
from tests.speculate import enumeration, tiny
from tests.speculate.enumeration import enumerate_sequences

OWN_SIZES = dict(num_heads=6, num_kv_heads=3, head_dim=4, intermediate_size=24,
                 rope=RopeConfig(theta=300.0))
VARIANTS = {
    "dflash": ("dflash", {}),
    "dflash-sliding": ("dflash", dict(window=2, sample_from_anchor=True, vocab=[0, 2, 3, 5, 10])),
    "dflash-mixed": ("dflash", dict(block=OWN_SIZES, windows=(3, 0), windows_causal=False)),
    "dspark": ("dspark", dict(confidence=True)),
    "dspark-gated": ("dspark", dict(markov_head="gated", vocab=[0, 2, 3, 5, 7, 10])),
    "dspark-rnn": ("dspark", dict(markov_head="rnn", sample_from_anchor=False)),
    "dspark-without": ("dspark", dict(markov_rank=0)),
}


def variants(*quick):
    return pytest.mark.parametrize(
        "variant", [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in VARIANTS])


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.2)


def make(policy, variant, block=None, scale=0.15, **options):
    """A draft with noise on every weight."""
    name, more = VARIANTS[variant]
    options = {**more, **options}
    windows, block = options.pop("windows", None), options.pop("block", block)
    if name == "dspark":
        options = {"markov_rank": 4, **options}
    draft = getattr(jspec.drafts, name)(policy, jax.random.key(1),
                                        **{"block_size": 4, "mask_token": 9, **options})
    config = draft.config
    if windows:
        config = dataclasses.replace(config, windows=windows)
    if block:
        config = dataclasses.replace(config, block=dataclasses.replace(config.block, **block))
        draft = draft.replace(weights=init_weights(draft.drafter.specs(config), jax.random.key(2),
                                                   0.2))
    return tiny.shaken(draft.replace(config=config), scale=scale)


@variants("dspark")
def test_state_depends_on_committed_tokens_only(policy, variant):
    recursive.check_state_depends_on_committed_tokens_only(policy, make(policy, variant),
                                                           without_entry=1)


def test_a_context_of_rejected_tokens_is_seen(policy, monkeypatch):
    """Kept where the next draft would have it, one position beyond what is committed."""
    monkeypatch.setattr(one_pass, "append", lambda cache, layers, lengths:
                        _append(cache, layers, lengths - 1))
    with pytest.raises(AssertionError):
        recursive.check_state_depends_on_committed_tokens_only(policy, make(policy, "dflash"),
                                                               without_entry=1)


_append = one_pass.append


def differences(policy, draft, turns=4):
    """Over all anchors of one sequence how far log q of the loss is from that of `propose`, where
    what is drafted happens to be the sequence's own tokens; and how many were compared."""
    config = draft.config
    k, sequence = config.predicted, np.random.default_rng(0).integers(0, 11, 12).tolist()
    starts = range(1, 12)
    ready = jspec.reshard(policy)
    prepared = draft.drafter.prepare(ready, draft)
    tokens = jnp.array([sequence[:n] + [0] * (12 - n) for n in starts], jnp.int32)
    lengths = jnp.array(starts)
    drawn = jnp.array([[*sequence, *[0] * k][n:n + k] for n in starts], jnp.int32)

    class Forced(base.Sampler):
        """Draws the sequence's own tokens."""

        def draw(self, logits, offset, vocab=None):
            return drawn[:, offset], super().draw(logits, offset, vocab)[1]

    @jax.jit
    def infer(ready, prepared):
        trunk, _ = prefill(ready, tokens, depths=draft.drafter.features(config))
        state = draft.drafter.start(ready, prepared, base.Prefill(trunk, tokens, lengths))
        state = base.DraftState.of_prompts(*state, 32)
        sampler = Forced(rejection_noise(jnp.zeros(2, jnp.uint32), lengths, lengths, k),
                         jnp.ones(len(starts)), None, 0, k)
        return draft.drafter.propose(ready, prepared, state, base.Committed(tokens, lengths),
                                     sampler)[0].log_q

    log_q = np.asarray(infer(ready, prepared))
    whole, worst, compared = jnp.array([sequence], jnp.int32), 0.0, set()
    batch = recursive.lesson(policy, draft, whole, jnp.array([2]), jnp.ones((1, 10), bool))
    for turn in range(turns):
        (_, trained), = recursive.spied_loss(policy, draft, batch.replace(turn=turn))
        at, moved = anchored.spread(config, batch.replace(turn=turn))
        for i, anchor in enumerate(np.asarray(at[0])):
            for j in range(k):
                if moved.mask[0, i * k + j]:
                    # starts begin at a length of 1, whose anchor is position 0
                    worst = max(worst, np.abs(trained[0, i * k + j] - log_q[anchor, j]).max())
                    compared.add((int(anchor), j))
    return worst, len(compared)


@variants("dflash-sliding", "dspark-rnn")
def test_the_loss_computes_what_propose_does(policy, variant):
    draft = make(policy, variant)
    worst, compared = differences(policy, draft)
    assert worst < 3e-5
    # anchors from the prompt's last but one on, each with all its slots but those beyond the end
    assert compared > 8 * draft.config.predicted


def test_an_anchors_slot_that_is_off_by_one_is_seen(policy, monkeypatch):
    states = one_pass.draft_states

    def late(policy, config, w, cache, pending, lengths, k):
        return states(policy, config, w, cache, pending, lengths + 1, k)

    monkeypatch.setattr(one_pass, "draft_states", late)
    assert differences(policy, make(policy, "dspark"), turns=1)[0] > 1e-2


def test_each_trained_token_is_predicted_once(policy):
    config = make(policy, "dflash").config
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 9)), jnp.int32)
    mask = jnp.array([[True] * 6, [True, False, True, True, False, False], [False] * 6])
    batch = base.DraftBatch(None, tokens, jnp.array([3, 3, 3]), mask, mask.astype(jnp.float32),
                            jnp.float32(1))
    seen = []
    for turn in range(3):
        at, moved = anchored.spread(config, batch.replace(turn=turn))
        np.testing.assert_array_equal(moved.mask.sum(1), mask.sum(1))
        np.testing.assert_array_equal(moved.logprobs.sum(1), mask.sum(1))
        positions = moved.response_start[:, None] + jnp.arange(moved.mask.shape[1])
        got = [sorted(np.asarray(p)[np.asarray(m)]) for p, m in zip(positions, moved.mask,
                                                                    strict=True)]
        assert got == [[3 + t for t in range(6) if m[t]] for m in np.asarray(mask)]
        seen.append(tuple(np.asarray(at[:, 0])))
    assert len(set(seen)) == 3  # other anchors at every turn


@pytest.mark.parametrize("kind", ["kl", pytest.param("ce_tv", marks=pytest.mark.slow)])
def test_the_loss_is_what_its_name_says(policy, kind):
    """By slot, with weights that fall with it, and the confidence head's part."""
    draft = make(policy, "dspark")
    rng, n = np.random.default_rng(1), draft.config.predicted
    tokens = jnp.asarray(rng.integers(0, 11, (3, 10)), jnp.int32)
    mask = jnp.asarray(rng.random((3, 6)) < 0.7)
    batch = recursive.lesson(policy, draft, tokens, jnp.array([2, 3, 4]), mask,
                             jnp.array([1.0, 0.5, 0.0]))
    (log_p, log_q), = recursive.spied_loss(policy, draft, batch)
    _, moved = anchored.spread(draft.config, batch)
    at, log_p, log_q = (np.asarray(x, np.float64) for x in (moved.mask, log_p, log_q))
    p, q = np.exp(log_p), np.exp(log_q)
    overlap = np.minimum(p, q).sum(-1)
    best = -np.take_along_axis(log_q, p.argmax(-1)[..., None], -1)[..., 0]
    losses = {"kl": (p * (log_p - log_q)).sum(-1), "ce_tv": 0.1 * best + 0.9 * (1 - overlap)}[kind]
    weights = np.exp(-(np.arange(at.shape[1]) % n) / 4.0) * at
    with_head, count, metrics = draft.drafter.loss(policy, draft, batch, kind)
    bare = draft.replace(config=dataclasses.replace(draft.config, confidence=False))
    without = bare.drafter.loss(policy, bare, batch, kind)[0]
    np.testing.assert_allclose(without, (weights * losses).sum(), rtol=1e-5)
    assert float(count) == int(mask.sum())
    by_slot = [(overlap * at)[:, j::n].sum() / max(at[:, j::n].sum(), 1) for j in range(n)]
    np.testing.assert_allclose(metrics["overlap"] / count, by_slot, rtol=1e-5)
    # a head that says nothing costs log 2 a slot
    dumb = jax.tree.map(jnp.zeros_like, draft.weights["confidence"])
    dumb = draft.replace(weights={**draft.weights, "confidence": dumb})
    np.testing.assert_allclose(dumb.drafter.loss(policy, dumb, batch, kind)[0] - without,
                               np.log(2) * weights.sum(), rtol=1e-4)
    assert abs(float(with_head - without) - np.log(2) * weights.sum()) > 1e-3
    nothing = batch.replace(mask=jnp.zeros_like(mask))
    assert draft.drafter.loss(policy, draft, nothing, kind)[0] == 0


@pytest.mark.slow
def test_parts_of_the_attention_are_the_whole(policy, monkeypatch):
    draft = make(policy, "dflash-mixed")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 14)), jnp.int32)
    batch = recursive.lesson(policy, draft, tokens, jnp.array([2, 3]), jnp.ones((2, 11), bool))

    def gradient(size):
        monkeypatch.setattr(anchored, "QUERY_BLOCK", size)
        return jax.jit(jax.grad(lambda w: draft.drafter.loss(policy, draft.replace(weights=w),
                                                             batch, "kl")[0]))(draft.weights)

    for a, b in zip(*map(jax.tree.leaves, (gradient(512), gradient(3))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@variants("dspark")
def test_training_reaches_every_weight(policy, variant):
    draft = make(policy, variant)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 12)), jnp.int32)
    batch = recursive.lesson(policy, draft, tokens, jnp.array([2, 3]), jnp.ones((2, 9), bool))
    grads = jax.jit(jax.grad(lambda w: draft.drafter.loss(policy, draft.replace(weights=w), batch,
                                                          "kl")[0]))(draft.weights)
    reached = jax.tree.map(lambda g: bool(jnp.isfinite(g).all() & (g != 0).any()), grads)
    assert all(jax.tree.leaves(reached)), reached


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dflash", "dspark"])
def test_a_trained_draft_is_accepted_more_often(policy, variant):
    recursive.check_a_trained_draft_is_accepted_more_often(policy, make(policy, variant, scale=0))


FEW_ROWS = 128  # enough for one draft and two tokens


def enumerated(variant, k=2, *, scale=0.4, max_new_tokens=3, stop_tokens=()):
    policy = tiny.policy(3, seed=3)
    draft = make(policy, variant, mask_token=2, vocab=None, scale=scale)
    sampling = dict(max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    got, _ = enumerate_sequences(policy, draft, [1, 0, 1, 0], k=k, **sampling)
    return tiny.distance(got, tiny.autoregressive(policy, [1, 0, 1, 0], **sampling))


@variants()
def test_emitted_sequences_have_the_autoregressive_distribution(variant):
    assert enumerated(variant) < 5e-6
    assert enumerated(variant, 3, max_new_tokens=4, stop_tokens=(0,)) < 5e-6


def test_q_before_the_bias_is_seen(monkeypatch):
    """Drawn with the Markov head's bias, judged without."""
    monkeypatch.setattr(enumeration, "ROWS", FEW_ROWS)
    draw = base.Sampler.draw
    module = jspec.drafts.find("dspark").propose.__globals__  # jspec.drafts.dspark makes drafts
    slot_logits, kept = module["slot_logits"], []

    def spied(*args):
        kept.append(slot_logits(*args))
        return kept[-1]

    def wrong(self, logits, offset, vocab=None):
        token, _ = draw(self, logits, offset, vocab)
        before = kept[-1][:, offset]
        return token, draw(self, before, offset, vocab)[1]

    monkeypatch.setitem(module, "slot_logits", spied)
    monkeypatch.setattr(base.Sampler, "draw", wrong)
    assert enumerated("dspark", 1, max_new_tokens=2) > 1e-3


def test_a_draft_drawn_in_bfloat16_is_seen(monkeypatch):
    monkeypatch.setattr(enumeration, "ROWS", FEW_ROWS)
    draw = base.Sampler.draw

    def rounded(self, logits, offset, vocab=None):
        token, _ = draw(self, logits.astype(jnp.bfloat16).astype(jnp.float32), offset, vocab)
        return token, draw(self, logits, offset, vocab)[1]

    monkeypatch.setattr(base.Sampler, "draw", rounded)
    assert enumerated("dflash", 1, max_new_tokens=2) > 1e-4


@pytest.mark.parametrize("name, options, message", [
    ("dflash", dict(aux_depths=(0, 1, 4)),
     r"dflash draft: auxiliary layers at depths \[0, 1, 4\] of a policy of 3 layers"),
    ("dflash", dict(mask_token=11), "dflash draft: mask_token = 11 is outside the policy's voc"),
    ("dflash", dict(block_size=1), "dflash draft: block_size = 1 must be at least 2"),
    ("dflash", dict(vocab=[1, 11]), "dflash draft: vocab holds token 11, outside the policy's 11"),
    ("dflash", dict(layers=0), "dflash draft: layers = 0 must be at least 1"),
    ("dspark", dict(layers=100), "dspark draft: layers = 100 must be at most 64"),
    ("dflash", dict(window=-1), "dflash draft: window = -1 must be at least 0"),
    ("dspark", dict(markov_head="deep"), "markov_head 'deep' is unknown; known: vanilla, gated"),
    ("dspark", dict(markov_rank=-1), "dspark draft: markov_rank = -1 must be at least 0"),
    ("dspark", dict(depths=3), "it has no option 'depths'"),
])
def test_it_refuses(policy, name, options, message):
    with pytest.raises(InputError, match=message):
        getattr(jspec.drafts, name)(policy, jax.random.key(0), **options)


@pytest.mark.parametrize("width", [0, 4])  # a Markov head may have no rank
def test_the_slots_that_predict(policy, width):
    config = make(policy, "dspark-rnn").config  # slot 0 is its anchor's
    x = jnp.arange(2 * 3 * 4 * width).reshape(2, 3, 4, width)
    np.testing.assert_array_equal(anchored.predicting(config, x),
                                  np.concatenate([x[:, i, 1:] for i in range(3)], axis=1))


@pytest.mark.parametrize("layers, depths", [(1, (1,)), (2, (1,)), (3, (1,)), (5, (2, 3)),
                                            (30, (2, 8, 15, 22, 28)), (36, (2, 10, 18, 26, 34))])
def test_the_default_depths_are_there(layers, depths):
    assert one_pass.default_depths(layers) == depths
