"""One update: what it computes, what it must not depend on, and what it does with numbers that are
none."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jspec
from jspec.model import ModelConfig, init_policy, prompt_forward, response_forward, train_forward
from jspec.rl import update as up
from jspec.rl.batch import TrainBatch, join
from jspec.rl.batch import make_batch as batch_of
from jspec.rl.losses import token_logprobs
from jspec.rl.optimizers import inside_blocks, optimizer, optimizers
from jspec.rl.state import TrainState, init_state
from jspec.rl.update_settings import OptimizerSettings, UpdateSettings, learned_from
from jspec.step import declare
from tests.compiling import as_users_compile

CONFIG = ModelConfig(vocab_size=23, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
                     num_kv_heads=2, head_dim=8, initializer_range=0.2)
SETTINGS = UpdateSettings(temperature=0.8, learning_rate=1e-3)
WITH_KL = dataclasses.replace(SETTINGS, kl_weight=0.5)
TRIMMED = dict(micro_batch=2, widths=(3,))
P, G, L, T = 2, 4, 16, 6
N = P * G

gradients = partial(jax.jit, static_argnames="settings")(up.gradients)
update = partial(jax.jit, static_argnames="settings",
                 compiler_options=as_users_compile())(up.update)


def make_state(draft="mtp", settings=SETTINGS):
    policy = init_policy(CONFIG, jax.random.key(0))
    options = {"depths": 1} if draft == "mtp" else {}
    made = draft and getattr(jspec.drafts, draft)(policy, jax.random.key(1), **options)
    return init_state(policy, made, settings, seed=0)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, N)
    return TrainBatch(
        prompts=jnp.asarray(rng.integers(0, CONFIG.vocab_size, (P, L)), jnp.int32),
        prompt_lengths=jnp.asarray(rng.integers(1, L + 1, P), jnp.int32),
        tokens=jnp.asarray(rng.integers(0, CONFIG.vocab_size, (N, T)), jnp.int32),
        logprobs=jnp.asarray(rng.normal(-3, 0.3, (N, T)), jnp.float32),
        mask=jnp.arange(T) < jnp.asarray(lengths)[:, None],
        advantages=jnp.asarray(rng.normal(0, 1, N), jnp.float32))


def same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, tolerance=1e-4):
    """Each leaf within `tolerance` of its own largest number: sums in another order round
    differently."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(
        x, y, rtol=0, atol=tolerance * (1e-3 + np.abs(x).max())), a, b)


def change(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


def own_logprobs(policy, batch, temperature=SETTINGS.temperature):
    """Of every row by itself, prompt included: what the update computes by group."""
    start = jnp.repeat(batch.prompt_lengths, G)
    hidden = train_forward(policy, join(batch.prompts, batch.prompt_lengths, batch.tokens)).hidden
    at = start[:, None] - 1 + jnp.arange(T)
    return token_logprobs(policy, jnp.take_along_axis(hidden, at[..., None], axis=1), batch.tokens,
                          temperature)[0]


def test_rows_are_joined_without_a_gap():
    prompts, lengths = jnp.array([[1, 2, 3, 9], [4, 9, 9, 9]]), jnp.array([3, 1])
    responses = jnp.array([[11, 12, 13], [14, 15, 0], [16, 0, 0], [17, 18, 19]])
    joined = jax.jit(join)(prompts, lengths, responses)
    np.testing.assert_array_equal(joined, [[1, 2, 3, 11, 12, 13, 0], [1, 2, 3, 14, 15, 0, 0],
                                           [4, 16, 0, 0, 0, 0, 0], [4, 17, 18, 19, 0, 0, 0]])
    pairs = join(*(jnp.stack([x, -x], -1) if x.ndim == 2 else x
                   for x in (prompts, lengths, responses)))
    np.testing.assert_array_equal(pairs, jnp.stack([joined, -joined], -1))


@pytest.mark.slow  # the next one sees it in what they make
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_policy_gradients_are_the_same_bits_with_and_without_a_draft(micro_batch):
    settings = dataclasses.replace(SETTINGS, micro_batch=micro_batch)
    batch = make_batch()
    (with_draft, metrics), of_draft = gradients(make_state("mtp"), None, batch, settings)
    (without, plain_metrics), nothing = gradients(make_state(None), None, batch, settings)
    assert nothing is None and optax.tree.norm(of_draft[0]) > 1e-3
    assert optax.tree.norm(without) > 1e-3
    same_bits(with_draft, without)
    same_bits(metrics, plain_metrics)


def test_policy_and_optimizer_after_an_update_are_the_same_bits_with_and_without_a_draft():
    batch = make_batch()
    a, _ = update(make_state("mtp"), None, batch, SETTINGS)
    b, _ = update(make_state("ngram"), None, batch, SETTINGS)
    same_bits((a.policy.weights, a.opt_state), (b.policy.weights, b.opt_state))


def test_the_draft_loss_has_no_gradient_to_the_policy():
    state, batch = make_state(), make_batch()

    def loss(weights, draft_weights):
        policy = state.policy.replace(weights=weights)
        prompt, keys_values = prompt_forward(policy, batch.prompts)
        trunks = prompt, response_forward(policy, batch.tokens, jnp.repeat(batch.prompt_lengths, G),
                                          keys_values, jnp.arange(N)[None] // G)
        logprobs = own_logprobs(policy, batch)
        return up.draft_loss(draft_weights, state.draft, policy, trunks, logprobs, batch,
                             SETTINGS)[0]

    of_policy, of_draft = jax.jit(jax.grad(loss, (0, 1)))(state.policy.weights, state.draft.weights)
    assert all(not np.any(x) for x in jax.tree.leaves(of_policy))
    assert optax.tree.norm(of_draft) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("drafter, options", [
    ("mtp", {}), ("eagle3", dict(micro_batch=4, widths=(3,)))])
def test_a_draft_learns_the_same_from_the_rollouts_states(drafter, options):
    """The verifier's states are those of the update's forward, so the gradients are too, and the
    policy stays."""
    settings = dataclasses.replace(SETTINGS, draft_features="rollout", **options)
    state = make_state(drafter)
    prompts = jspec.PromptBatch.from_tokens([[3, 4, 5], [7, 8, 9, 10, 11]], group_size=G, seed=1)
    out = jspec.rollout(state.policy, state.draft, prompts,
                        sampling=jspec.Sampling(max_new_tokens=T, temperature=SETTINGS.temperature),
                        speculation=jspec.Speculation(k=2,
                                                      depths=learned_from(state.draft, settings)))
    batch = batch_of(prompts, out, jnp.ones(N))
    _, wanted = gradients(state, None, batch, SETTINGS)
    close(jax.jit(up.draft_gradients, static_argnums=2)(state, batch, settings), wanted)
    _, nothing = jax.eval_shape(partial(up.gradients, settings=settings), state, None, batch)
    assert nothing is None and optax.tree.norm(wanted[0]) > 1e-3
    new, metrics = jax.jit(up.update_draft, static_argnums=2)(state, batch, settings)
    same_bits((new.policy.weights, new.opt_state, new.updates),
              (state.policy.weights, state.opt_state, state.updates))
    assert change(new.draft.weights, state.draft.weights) > 1e-3 and metrics["draft/loss"] > 0


@pytest.mark.parametrize("options",
                         [dict(TRIMMED, remat=True), pytest.param(dict(), marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_the_objective_written_out(options):
    """Of all rows at full width, each with its own prompt, however the update cuts them."""
    state, batch = make_state(None), make_batch()

    def objective(weights):
        logprobs = own_logprobs(state.policy.replace(weights=weights), batch)
        ratio, adv = jnp.exp(logprobs - batch.logprobs), batch.advantages[:, None]
        each = jnp.minimum(ratio * adv, jnp.clip(ratio, 0.8, 1.28) * adv)
        return -jnp.sum(each, where=batch.mask) / batch.mask.sum(dtype=jnp.float32)

    expected, grads = jax.jit(jax.value_and_grad(objective))(state.policy.weights)
    (got, metrics), _ = gradients(state, None, batch, dataclasses.replace(SETTINGS, **options))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    close(got, grads, 1e-5)


@pytest.mark.parametrize("options", [
    dict(TRIMMED, remat=True), *(pytest.param(options, marks=pytest.mark.slow) for options in (
        dict(TRIMMED, micro_batch=1, widths=(4, 2)), dict(TRIMMED, draft_loss="tv", widths=(1, 5)),
        dict(TRIMMED, draft_loss="overlap", clip_low=0.05, clip_high=0.05)))])
def test_neither_micro_batches_nor_widths_nor_remat_change_the_update(options):
    # rows have different numbers of tokens: a mean of means would show
    batch, reference = make_batch(), init_policy(CONFIG, jax.random.key(7))
    split = dataclasses.replace(WITH_KL, **options)
    whole = dataclasses.replace(split, micro_batch=0, widths=(), remat=False)
    a, b = (gradients(make_state(), reference, batch, settings) for settings in (whole, split))
    close(a, b, 1e-5)
    programs = gradients._cache_size()
    other = batch.replace(mask=jnp.arange(T) < jnp.array([1, 1, 2, 6, 0, 1, 3, 1])[:, None])
    close(*(gradients(make_state(), reference, other, settings) for settings in (whole, split)),
          1e-5)
    assert gradients._cache_size() == programs  # lengths are data


def test_only_masked_tokens_count_the_last_one_included():
    state, batch = make_state(), make_batch()
    (grads, metrics), (draft_grads, _) = gradients(state, None, batch, SETTINGS)
    past = ~batch.mask
    other = batch.replace(tokens=jnp.where(past, 3, batch.tokens),
                          logprobs=jnp.where(past, 99.0, batch.logprobs))
    (again, same), (draft_again, _) = gradients(state, None, other, SETTINGS)
    close((grads, metrics, draft_grads), (again, same, draft_again), 1e-6)
    last = jnp.arange(T) == batch.mask.sum(1, keepdims=True) - 1
    fewer = batch.replace(mask=batch.mask & ~last)
    (shorter, _), (draft_shorter, _) = gradients(state, None, fewer, SETTINGS)
    for a, b in ((grads, shorter), (draft_grads, draft_shorter)):
        assert change(a, b) > 1e-3


def test_metrics_say_what_happened():
    state, batch = make_state(), make_batch()
    logprobs = own_logprobs(state.policy, batch)
    old = logprobs.at[2, 0].add(0.5)  # a ratio of exp(-0.5), and row 2's advantage is made negative
    batch = batch.replace(logprobs=old, advantages=batch.advantages.at[2].set(-1.0))
    _, metrics = update(state, None, batch, SETTINGS)
    count = float(batch.mask.sum())
    np.testing.assert_allclose(metrics["logprob_gap"], 0.5, rtol=1e-4)
    np.testing.assert_allclose(metrics["logprob_gap_mean"], 0.5 / count, rtol=1e-3)
    np.testing.assert_allclose(metrics["clip_fraction"], 1 / count, rtol=1e-5)
    assert metrics["trained_tokens"] == count and 0 < metrics["entropy"] < np.log(CONFIG.vocab_size)
    assert (metrics["draft/loss"] > 0 and metrics["draft/overlap"].shape
            == (state.draft.config.depths,))
    assert np.all((metrics["draft/overlap"] > 0) & (metrics["draft/overlap"] <= 1))


def test_kl_to_the_reference_is_zero_at_first_and_pulls_back_later():
    state, batch = make_state(), make_batch()
    batch = batch.replace(advantages=jnp.zeros(N))  # nothing but the KL is left
    (grads, metrics), _ = gradients(state, state.policy, batch, WITH_KL)
    assert abs(metrics["kl"]) < 1e-6 and optax.tree.norm(grads) < 1e-4
    other = init_policy(CONFIG, jax.random.key(5))
    (grads, metrics), _ = gradients(state, other, batch, WITH_KL)
    assert metrics["kl"] > 0.1 and optax.tree.norm(grads) > 1e-2
    np.testing.assert_allclose(metrics["loss"], 0.5 * metrics["kl"], rtol=1e-6)


@pytest.mark.slow
def test_the_drafts_clip_rate_and_pace_are_its_own():
    own = OptimizerSettings(learning_rate=7.0, clip=1e-6)
    theirs = dataclasses.replace(SETTINGS, draft_optimizer=own, draft_every=3,
                                 updates_per_rollout=2)
    a = b = make_state()
    batch, moved = make_batch(), []
    for _ in range(8):
        before = b.draft.weights
        (a, _), (b, metrics) = (update(state, None, batch, s)
                                for state, s in ((a, SETTINGS), (b, theirs)))
        moved.append(change(b.draft.weights, before) > 0)
        same_bits(a.policy.weights, b.policy.weights)
        assert moved[-1] or metrics["draft/grad_norm"] == 0
    assert moved == [True, True, False, False, False, False, True, True]


@pytest.mark.parametrize("side", [0, 1])
def test_gradients_are_clipped_to_each_sides_own_norm(side):
    settings = UpdateSettings(learning_rate=0.5, clip=2.0,
                              draft_optimizer=OptimizerSettings(learning_rate=0.25, clip=3.0))
    optimizer = optimizers(settings)[side]
    weights = {"a": jnp.zeros(3)}
    _, (_, (adam, *_)) = up.apply_gradients(optimizer, weights, optimizer.init(weights),
                                            {"a": jnp.full(3, 1e3)}, jnp.array(True))
    np.testing.assert_allclose(optax.tree.norm(adam.mu), 0.1 * (2.0, 3.0)[side], rtol=1e-5)


@pytest.mark.parametrize("per_step", [1, 2])
def test_warmup_counts_steps_however_many_updates_they_have(per_step):
    settings = UpdateSettings(learning_rate=1e-2, warmup_steps=4, updates_per_rollout=per_step)
    weights, sizes = {"a": jnp.zeros(2)}, []
    opt_state = optimizers(settings)[0].init(weights)
    for updates in range(6 * per_step):
        optimizer, _ = optimizers(settings, updates)
        new, opt_state = up.apply_gradients(optimizer, weights, opt_state, {"a": jnp.ones(2)},
                                            jnp.array(True))
        sizes.append(change(new, weights) / np.sqrt(2))
        weights = new
    expected = [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01]  # the first update already moves
    np.testing.assert_allclose(sizes, np.repeat(expected, per_step), rtol=1e-3)


@pytest.mark.parametrize("draft, options",
                         [("mtp", {"blocks": 2}), ("eagle3", {"own_embed": True})])
def test_muon_has_the_matrices_inside_blocks_and_adamw_all_else(draft, options):
    policy = jax.eval_shape(lambda: init_policy(CONFIG, jax.random.key(0)))
    weights = jax.eval_shape(lambda p: getattr(jspec.drafts, draft)(p, jax.random.key(1),
                                                                    **options).weights, policy)
    muon = {jax.tree_util.keystr(path) for path, given in jax.tree_util.tree_leaves_with_path(
        inside_blocks(weights),
        is_leaf=lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers))}
    blocks = [f"['blocks'][{i}]['layer']" for i in range(2)] if draft == "mtp" else ["['layer']"]
    assert (muon == {f"{block}['{name}']" for block in blocks
                     for name in ("q", "k", "v", "o", "gate", "up", "down")})
    state = jax.eval_shape(optimizer(OptimizerSettings("muon"), 1e-3).init, weights)
    moments = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    # only AdamW has second moments
    second = {name.split(".nu", 1)[1] for name in moments if ".nu" in name}
    assert (second == {jax.tree_util.keystr(p)
                       for p, _ in jax.tree_util.tree_leaves_with_path(weights)} - muon)


def test_a_policy_without_sound_gradients_is_left_alone_while_the_draft_goes_on():
    state, batch = make_state(), make_batch()
    bad = batch.replace(advantages=batch.advantages.at[0].set(jnp.nan))
    new, metrics = update(state, None, bad, SETTINGS)
    same_bits((new.policy.weights, new.opt_state), (state.policy.weights, state.opt_state))
    assert int(new.skipped) == int(new.skipped_in_row) == 1 and int(new.draft_skipped) == 0
    assert change(new.draft.weights, state.draft.weights) > 1e-3
    again, _ = update(new, None, bad, SETTINGS)
    assert int(again.skipped_in_row) == 2
    healed, metrics = update(again, None, batch, SETTINGS)
    assert (int(healed.skipped) == 2 and int(healed.skipped_in_row) == 0 and int(metrics["skipped"])
            == 2)
    assert int(healed.updates) == 3


def test_a_draft_without_sound_gradients_is_left_alone_while_the_policy_goes_on():
    state, batch = make_state(), make_batch()
    (block,) = state.draft.weights["blocks"]
    broken = {"blocks": ({**block, "proj": block["proj"].at[0, 0].set(jnp.inf)},)}
    state = state.replace(draft=state.draft.replace(weights=broken))
    new, _ = update(state, None, batch, SETTINGS)
    same_bits((new.draft.weights, new.draft_opt_state),
              (state.draft.weights, state.draft_opt_state))
    assert int(new.draft_skipped) == int(new.draft_skipped_in_row) == 1 and int(new.skipped) == 0
    plain, _ = update(make_state("ngram"), None, batch, SETTINGS)
    same_bits(new.policy.weights, plain.policy.weights)


def test_the_updates_own_logprobs_are_the_rollouts():
    state = make_state()
    prompts = jspec.PromptBatch.from_tokens([[1, 2, 3], [4, 5]], group_size=4, seed=3)
    gaps = []
    for temperature in (0.8, 0.0):
        rollout = jspec.rollout(state.policy, state.draft, prompts, sampling=jspec.Sampling(
            max_new_tokens=T, temperature=temperature, stop_tokens=tuple(range(0, 23, 2))),
            speculation=jspec.Speculation(k=2))
        assert bool(jnp.any(rollout.finished))  # so that end tokens are among them
        batch = batch_of(prompts, rollout, jnp.ones(N))
        gap = own_logprobs(state.policy, batch, temperature) - batch.logprobs
        gaps.append(jnp.abs(jnp.where(batch.mask, gap, 0.0)).max())
        if temperature:
            _, metrics = update(state, None, batch, SETTINGS)
            np.testing.assert_allclose(metrics["logprob_gap"], gaps[0], atol=2e-6)
            np.testing.assert_allclose(metrics["entropy"],
                                       rollout.entropy.sum() / float(rollout.mask.sum()), rtol=1e-5)
    assert max(gaps) < 1e-5


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_answers_that_were_cut_off_may_be_left_out_but_for_their_groups_mean(monkeypatch,
                                                                             mask_truncated):
    settings = dataclasses.replace(SETTINGS, mask_truncated=mask_truncated)
    seen, ones = [], jnp.ones((4, 3), bool)
    monkeypatch.setattr("jspec.step.update", lambda state, reference, batch, settings: (
        seen.append(batch) or state, {}))
    finished = jnp.array([True, False, True, True])
    zeros = jnp.zeros((4, 3))
    out = jspec.Rollout(ones.astype(jnp.int32), ones, zeros, ones.at[0, 2].set(False), zeros,
                        jnp.full(4, 3), finished, None)
    prompts = jspec.PromptBatch.from_tokens([[1, 2], [4, 5]], group_size=2, seed=3)
    # nothing here looks into it
    state = TrainState(**dict.fromkeys(x.name for x in dataclasses.fields(TrainState)))
    with jax.disable_jit():
        declare(state, settings).update(state, None, prompts, out, jnp.array([3.0, 1.0, 2.0, 2.0]))
    (batch,) = seen
    trained = np.array([[1, 1, 0], [1 - mask_truncated] * 3, [1] * 3, [1] * 3], bool)
    np.testing.assert_array_equal(batch.mask, trained)
    np.testing.assert_allclose(batch.advantages, [1, -1, 0, 0], atol=1e-5)
