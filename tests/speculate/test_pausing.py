"""Rows that leave the device and come back go on as if nothing had been: under `coupled` not a
token is another, nor is what is drafted. Each planted bug is seen by the same comparison.

Blocks are of 8 positions here: a row takes up to 6 of its own, and the pool has no more than one
such row and the prompts must have.
"""

import functools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.model import policy_sharding, pool
from jspec.sharding import make_mesh
from jspec.speculate import pausing, state
from jspec.speculate.blocks import Blocks
from jspec.speculate.rollout import Prefilled, _asked, begin
from tests.speculate import drafters, test_chi_square, tiny
from tests.speculate.test_chi_square import FEW, PLANTED, PROMPT, REFUSE, SHARP
from tests.speculate.ties import assert_same, generated
from tests.test_sharding import on_devices

PROMPTS = [[1, 2, 1, 2, 1], [*range(1, 9), 1, 2, 5, 6], [7, 6] * 5, [4]]
CAP, K = 40, 2
LIMIT = np.tile([40, 25, 1, 40, 15, 40], 2)
SAMPLING = jspec.Sampling(max_new_tokens=CAP, min_new_tokens=20, top_k=8, stop_tokens=(3,),
                          limit=jnp.asarray(LIMIT),
                          temperature=jnp.tile(jnp.array([1.0, 0.7, 1.3]), 4))
BATCH = jspec.PromptBatch.from_tokens(PROMPTS, group_size=3, seed=1, buckets=(16,))
LEAST = (4 * 2 + 7) * 8
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "BLOCK", 8)
        yield


AROUND = {f"mixed:{name}": name for name in ("dflash", "dspark", "peagle", "draft_model")}


def make_policy():
    return tiny.policy(12, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.25)


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def run(policy, draft=None, k=K, slots=None, kv_tokens=None):
    make = drafters.mixed_around if draft in AROUND else drafters.make
    name = AROUND.get(draft, draft)
    made = None if name is None else make(name, policy, seed=1, scale=0.05)
    return jspec.rollout(policy, made, BATCH, sampling=SAMPLING,
                         batching=jspec.Batching(slots, kv_tokens),
                         speculation=jspec.Speculation(k=k, rule="coupled"))


@pytest.fixture(scope="module")
def roomy(policy):
    """draft -> a rollout in which no row is paused."""
    return functools.cache(functools.partial(run, policy))


SHRINKING = ((1, 3), (2, 0), (3, 2))
CASES = [("mtp", K, None), *(pytest.param(draft, K, slots, marks=slow)
                             for draft in (None, *drafters.NAMES) for slots in (3, None)),
         *(pytest.param(draft, SHRINKING, 5, marks=slow) for draft in (None, "mtp", "suffix"))]


@pytest.mark.parametrize("draft, k, slots", [
    *CASES, *(pytest.param(draft, K, None, marks=slow) for draft in AROUND)])
def test_paused_rows_go_on_as_if_nothing_had_been(policy, roomy, draft, k, slots):
    least = LEAST if k == K else LEAST + 8
    plain, out = roomy(), run(policy, draft, k, slots, least)
    assert int(out.stats.pauses[0]) > 0 and int(out.stats.blocks[0]) <= least // 8
    assert_same(policy, BATCH, SAMPLING, plain, out)
    np.testing.assert_array_equal(np.minimum(out.lengths, LIMIT), plain.lengths)
    np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=1e-4)
    # they look at siblings, as far as these have come
    if k == K and draft not in (*drafters.HISTORIC, *AROUND):
        np.testing.assert_array_equal(out.stats.cycles, roomy(draft).stats.cycles)
    assert int(out.stats.loop_live.sum()) == int(out.stats.cycles.sum())


def test_a_pool_for_all_is_what_it_was(policy, roomy):
    """Rows are paused by nothing that is compiled where there are blocks for all."""
    most = (8 + 12 * 7) * 8

    def program(kv_tokens):
        lowered = jax.jit(functools.partial(
            jspec.rollout, sampling=SAMPLING, speculation=jspec.Speculation(k=0),
            batching=jspec.Batching(kv_tokens=kv_tokens))).lower(policy, None, BATCH)
        return lowered.as_text()

    assert program(None) == program(most)
    assert roomy().stats.pauses.tolist() == [0]


def test_how_many_blocks():
    """Of 8 prompts of 384 tokens, 16 answers each, the prompts' blocks are there once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "BLOCK", 128)
        blocks = Blocks.of(8, 384, 512, 3)
    assert (blocks.size, blocks.prompts, blocks.row) == (128, 8 * 3, 6)
    assert blocks.pool(128, None, 1) == (24 + 128 * 6, 0)
    most = (24 + 128 * 6) * 128
    assert blocks.pool(128, most, 1) == blocks.pool(128, None, 1)
    held, away = blocks.pool(128, most * 6 // 10, 1)
    assert held == (24 + 128 * 6) * 6 // 10 and held + away <= 24 + 129 * 6
    assert blocks.pool(1, 30 * 128, 1) == (30, 0) and blocks.pool(2, 35 * 128, 1) == (35, 6)
    blocks.check("kv_tokens", 30 * 128, 1)
    for tokens, shards, words in (
        (30 * 128 - 1, 1, "29 blocks of 128 positions, .* give at least 3840"),
        (60 * 128 - 1, 2, "29 blocks .* on each of the mesh's 2 .* at least 7680")):
        with pytest.raises(jspec.InputError, match=words):
            blocks.check("kv_tokens", tokens, shards)


def test_the_longest_get_a_slot_first(policy):
    """Where something is known of them; rows without an answer come last."""
    prompts, heads = len(PROMPTS), (2, 8)
    keys = jnp.zeros((prompts, 16, *heads))
    made = Prefilled(BATCH.tokens, BATCH.lengths, ((keys, keys),), None, (), None)

    def order(expected):
        batch = BATCH.replace(expected_lengths=expected)
        asked = _asked(policy, batch, SAMPLING, 1)
        asked = asked.replace(done=jnp.arange(12) == 3)
        return begin(policy, made, asked, cap=CAP, slots=3, k=K, chain=1, cuts=False,
                     group_size=3).waiting.tolist()

    assert order(None) == [0, 1, 2, *range(4, 12), 3]
    assert order(jnp.array([7, 40, 0, 7])) == [4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8, 3]


def eager(now, sequences, asking, k):
    """`fitting` that keeps no room for what is to come: rows are paused as often as can be. Of
    blocks of 1."""
    needed = (jnp.take(now.sequences.lengths, sequences, mode="clip") + k + 1
              - state.shared_blocks(now, sequences))
    fits = jnp.cumsum(needed, dtype=jnp.int32) <= now.free.count
    return jnp.minimum((fits & asking).sum(dtype=jnp.int32), (~now.live).sum(dtype=jnp.int32))


def p_value(patch, draft, rule, samples, slots=64, scale=0.2):
    """Of what is emitted where every row has as many blocks as positions, and rows that get longer
    have to leave."""
    patch.setattr(pool, "BLOCK", 1)
    patch.setattr(state, "fitting", eager)
    patch.setattr(pausing, "fitting", eager)
    policy = drafters.policy(draft, 4, seed=2, scale=scale)
    made = drafters.make(draft, policy, seed=SHARP if draft == "sharp" else 3, scale=0.2)
    batch = jspec.PromptBatch.from_tokens([PROMPT], group_size=samples, seed=0, buckets=(4,))
    out = jspec.rollout(policy, made, batch,
                        sampling=jspec.Sampling(max_new_tokens=4, stop_tokens=()),
                        speculation=jspec.Speculation(k=2, rule=rule),
                        batching=jspec.Batching(slots, kv_tokens=4 + slots * 4))
    assert int(out.stats.pauses[0]) > samples // 20
    want = tiny.autoregressive(policy, PROMPT, max_new_tokens=4)
    return test_chi_square.p_value(Counter(tiny.sequences(out)), want)


@slow
@pytest.mark.parametrize("draft, rule, samples", [("sharp", "rejection", FEW // 8), *(
    pytest.param(draft, rule, FEW, marks=slow) for draft in ("mtp", "sharp")
    for rule in ("rejection", "block"))])
def test_the_distribution_with_rows_paused_between_cycles(monkeypatch, draft, rule, samples):
    assert p_value(monkeypatch, draft, rule, samples) > REFUSE


def worker(*drafts):
    """Rollouts on eight devices, four shards of the batch, as JSON."""
    mesh, found = make_mesh(2, 2, 2), []
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(pool, "BLOCK", 8)
        policy = make_policy()
        policy = policy.replace(weights=jax.device_put(policy.weights,
                                                       policy_sharding(policy.config, mesh)))
        for draft in drafts:
            out = run(policy, draft, kv_tokens=4 * (2 + 7) * 8)
            stats = {name: getattr(out.stats, name).tolist()
                     for name in ("pauses", "blocks", "loop_cycles", "cycles")}
            found.append({"tokens": out.tokens.tolist(), "lengths": out.lengths.tolist(), **stats})
    print(json.dumps(found))


@slow
def test_each_of_eight_devices_pauses_its_own(policy, roomy):
    """The tokens are those of one device, and no shard waits for another's longest row."""
    plain, drafts = roomy(), ("mtp", "mixed", *AROUND)
    found = on_devices(8, f"from tests.speculate.test_pausing import worker; worker(*{drafts})")
    for made in found:
        assert_same(policy, BATCH, SAMPLING, plain,
                    plain.replace(tokens=np.array(made["tokens"]),
                                  lengths=np.array(made["lengths"])))
        assert sum(made["pauses"]) > 0 and max(made["blocks"]) <= 2 + 7
        assert len({cycles for cycles, in made["loop_cycles"]}) > 1
    np.testing.assert_allclose(found[0]["cycles"], roomy("mtp").stats.cycles, atol=1)


# --- planted bugs ---


def _to_the_wrong_place(patch):
    """The blocks of a row come back in another order."""
    def copy(target, at, of, source):
        wrong = jnp.maximum(source - 1, 0) if hasattr(of, "pauses") else source
        return COPY_BLOCKS(target, at, of, wrong)

    patch.setattr(pausing, "_copy_blocks", copy)


def _draft_left_behind(patch):
    """A row goes on with the draft state of the row that its slot had last."""
    patch.setattr(pausing, "_copy_row", lambda target, at, of, source: target)


def _not_put_away(patch):
    """The blocks are given to others, and nothing is kept of them."""
    def copy(target, at, of, source):
        return COPY_BLOCKS(target, at, of, source) if hasattr(of, "pauses") else target

    patch.setattr(pausing, "_copy_blocks", copy)


COPY_BLOCKS = pausing._copy_blocks


def planted(monkeypatch, policy, bug, draft, kv_tokens):
    """kv_tokens: of this bug alone, so that nothing is taken that was compiled without it."""
    bug(monkeypatch)
    return run(policy, draft, kv_tokens=kv_tokens)


@pytest.mark.parametrize("bug, more",
                         [(_to_the_wrong_place, 1), pytest.param(_not_put_away, 2, marks=slow)])
def test_planted_bugs_change_tokens(policy, roomy, monkeypatch, bug, more):
    out = planted(monkeypatch, policy, bug, None, LEAST + more)
    assert int(out.stats.pauses[0]) > 0
    assert sum(a != b for a, b in zip(generated(roomy()), generated(out), strict=True)) > 1


@slow
def test_a_planted_bug_changes_the_distribution(monkeypatch):
    assert p_value(monkeypatch, "sharp", "rejection", FEW, slots=65, scale=1.0) > REFUSE
    _to_the_wrong_place(monkeypatch)
    assert p_value(monkeypatch, "sharp", "rejection", FEW, scale=1.0) < PLANTED


@slow
def test_a_draft_state_that_was_left_behind_changes_what_is_drafted(policy, roomy, monkeypatch):
    out = planted(monkeypatch, policy, _draft_left_behind, "mtp", LEAST + 3)
    assert (generated(out)
            == generated(roomy("mtp")) and np.any(out.stats.cycles != roomy("mtp").stats.cycles))
