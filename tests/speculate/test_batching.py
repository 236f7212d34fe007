"""Slots, the chain of loops and the pool change nothing that is emitted: under `coupled` not a
token.

Blocks are of 16 positions here: prompts fill some that siblings share, and rows take further ones
as they grow. Each planted bug of the engine is seen by the same comparison.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.model import pool
from jspec.speculate import loops, state
from tests.speculate import drafters, tiny
from tests.speculate.ties import assert_same, generated

PROMPTS = [[1, 2, 1, 2, 1], list(range(1, 9)) * 5, [7, 6] * 10, [4]]
LIMIT = np.tile([24, 7, 1, 24, 15, 24], 2)
SAMPLING = jspec.Sampling(max_new_tokens=24, min_new_tokens=1, top_k=8, stop_tokens=(3,),
                          limit=jnp.asarray(LIMIT),
                          temperature=jnp.tile(jnp.array([1.0, 0.7, 1.3]), 4))
BATCH = jspec.PromptBatch.from_tokens(PROMPTS, group_size=3, seed=1, buckets=(40,))
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "BLOCK", 16)
        yield


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.25)


def run(policy, draft=None, k=0, slots=None, rule="coupled", kv_tokens=None, groups=None):
    made = None if draft is None else drafters.make(draft, policy, seed=1, scale=0.05)
    return jspec.rollout(policy, made, BATCH, sampling=SAMPLING,
                         batching=jspec.Batching(slots, kv_tokens, groups),
                         speculation=jspec.Speculation(k=k, rule=rule))


@pytest.fixture(scope="module")
def plain(policy):
    """One token a cycle, every sequence in a slot of its own, one loop."""
    return run(policy)


SHRINKING = ((1, 3), (2, 0), (3, 2))
CASES = [pytest.param(None, 0, 1, marks=slow), ("mtp", SHRINKING, 5),
         *(pytest.param(draft, k, slots, marks=slow) for draft in (None, *drafters.NAMES)
           for k, slots in ((2, 1), (3, 3), (SHRINKING, None), (SHRINKING, 5)))]


@pytest.mark.parametrize("draft, k, slots", CASES)
def test_the_tokens_are_those_of_plain_decoding(policy, plain, draft, k, slots):
    out = run(policy, draft, k, slots)
    assert_same(policy, BATCH, SAMPLING, plain, out)
    np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=1e-4)
    assert np.all(np.asarray(out.lengths) <= LIMIT) and out.lengths.max() == 24
    np.testing.assert_array_equal(out.finished, plain.finished)


@slow
def test_counts(policy, plain):
    """Of one chain: every row's cycles are counted in the loop it was in, and a prompt's blocks are
    there once."""
    out = run(policy, "mtp", SHRINKING, 5)
    assert out.stats.slots == (5, 3, 2, 1)
    assert int(out.stats.loop_live.sum()) == int(out.stats.cycles.sum())
    cycles, live = np.asarray(out.stats.loop_cycles[0]), np.asarray(out.stats.loop_live[0])
    assert np.all(live <= cycles * out.stats.slots) and np.all(live[1:] > 0)
    assert (float(out.stats.occupancy)
            == pytest.approx(live.sum() / (cycles * out.stats.slots).sum()))
    # prompts: 1, 3, 2 and 1 blocks. A row beside them: what it generates, and the end of its prompt
    for stats, rows in ((plain.stats, 12), (out.stats, 5)):
        assert 7 < int(stats.blocks[0]) <= 7 + rows * 3
    # a draft's state depends on what is committed only: no move changes what is drafted
    alone = run(policy, "mtp", 2)
    np.testing.assert_array_equal(run(policy, "mtp", ((5, 2), (2, 2)), 5).stats.cycles,
                                  alone.stats.cycles)


ENDED = [(None, 0, None, None), *(pytest.param(*case, marks=slow) for case in (
    (None, ((5, 0), (12, 0)), None, None), (None, 0, 5, None), ("mtp", SHRINKING, 5, None),
    ("mtp", SHRINKING, None, None), (None, 0, 8, 16 * 17), ("mtp", 2, 8, 16 * 17)))]


@pytest.mark.parametrize("draft, k, slots, kv_tokens", ENDED)
def test_a_rollout_ends_when_so_many_groups_are_done(policy, plain, draft, k, slots, kv_tokens):
    """What is done is what it would have been, the rest the beginning of that."""
    out = run(policy, draft, k, slots, kv_tokens=kv_tokens, groups=2)
    lengths, done, whole = (np.asarray(x) for x in (out.lengths, out.done, plain.lengths))
    assert 2 <= done.reshape(4, 3).all(1).sum() < 4 and np.all(plain.done)
    assert np.all(lengths <= whole) and np.array_equal(lengths[done], whole[done])
    assert [row[:n] for row, n in zip(generated(plain), lengths, strict=True)] == generated(out)
    np.testing.assert_array_equal(out.finished, plain.finished & done)
    np.testing.assert_array_equal(out.mask, np.arange(24) < lengths[:, None])
    np.testing.assert_allclose(out.logprobs, np.where(out.mask, plain.logprobs, 0), atol=1e-4)
    if slots is None and draft is None:  # a token a cycle, and all begin at once
        over = np.sort(whole.reshape(4, 3).max(1))[1]
        np.testing.assert_array_equal(lengths, np.minimum(whole, over))
        assert out.stats.loop_cycles.sum() == over


def test_the_chain():
    sizes = {slots: [rows for rows, _ in loops.loops(slots, 3, 512)]
             for slots in (1, 8, 12, 32, 256)}
    assert sizes == {1: [1], 8: [8, 3, 1], 12: [12, 4, 1], 32: [32, 11, 4, 1], 256: [256, 41, 7, 1]}
    assert loops.loops(32, 3, 20) == ((32, 3),)  # so few tokens are not worth a second compilation
    assert loops.loops(32, ((4, 7), (16, 3)), 20) == ((32, 0), (16, 3), (4, 7))
    assert loops.loops(10, ((4, 7), (16, 3)), 512) == ((10, 3), (4, 7))
    assert loops.loops(4, ((4, 7), (16, 3)), 512) == ((4, 7),)


# --- planted bugs ---


def _freed_with_the_first_sibling(patch):
    """A prompt's blocks are freed while siblings read them."""
    def retire(now):
        return RETIRE(
            now.replace(prompts=now.prompts.replace(readers=jnp.minimum(now.prompts.readers, 1))))

    patch.setattr(loops, "retire", retire)


def _no_copy_of_the_last_block(patch):
    """Siblings write to the block in which their prompt ends."""
    def admit(now, k):
        new = ADMIT(now, k)
        prompt = new.sequences.prompts[jnp.minimum(new.slots, len(LIMIT) - 1)]
        last = (new.prompts.lengths[prompt] - 1) // new.cache.size
        rows = jnp.arange(len(new.slots))
        table = new.cache.table.at[rows, last].set(new.prompts.table[prompt, last])
        return state.with_table(new, jnp.where(new.live[:, None], table, new.cache.blocks))

    patch.setattr(loops, "admit", admit)


def _table_not_moved(patch):
    """After rows are moved together each has the line of the row that was there."""
    def compact(now, rows):
        return state.with_table(COMPACT(now, rows), now.cache.table[:rows])

    patch.setattr(loops, "compact", compact)


def _draft_not_moved(patch):
    """After rows are moved together each has the draft state of the row that was there: no token
    shows it, what is accepted does."""
    def compact(now, rows):
        kept = jax.tree.map(lambda x: x[:rows], now.draft.rows)
        new = COMPACT(now, rows)
        return new.replace(draft=new.draft.replace(rows=kept))

    patch.setattr(loops, "compact", compact)


def _noise_of_the_slot(patch):
    """A slot goes on with the noise of the sequence that it held first."""
    def rows(now):
        return ROWS(now).replace(ids=now.sequences.ids[:len(now.slots)])

    patch.setattr(loops, "rows_in_slots", rows)


def _written_after_it_was_given_away(patch):
    """A slot that is over keeps its line, and goes on writing to blocks that are others' by now."""
    def retire(now):
        return state.with_table(RETIRE(now), now.cache.table)

    patch.setattr(loops, "retire", retire)


ADMIT, COMPACT, RETIRE, ROWS = state.admit, state.compact, state.retire, state.rows_in_slots


@pytest.fixture
def retraced():
    jax.clear_caches()
    yield
    jax.clear_caches()


BUGS = [_freed_with_the_first_sibling, _no_copy_of_the_last_block, _table_not_moved,
        _noise_of_the_slot, _written_after_it_was_given_away]
REFILLED = BUGS[:4:3]  # the others show where there are slots for all


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=() if i < 1 else slow, id=bug.__name__)
                                 for i, bug in enumerate(BUGS)])
def test_planted_bugs_change_tokens(policy, plain, monkeypatch, retraced, bug):
    bug(monkeypatch)
    out = run(policy, None, ((3, 0), (6, 0)), 5 if bug in REFILLED else None)
    assert sum(a != b for a, b in zip(generated(plain), generated(out), strict=True)) > 1


@slow
def test_a_draft_state_that_was_not_moved_changes_what_is_drafted(policy, monkeypatch, retraced):
    ks = ((12, 2), (8, 2), (5, 2), (3, 2))
    right = run(policy, "mtp", ks)
    _draft_not_moved(monkeypatch)
    jax.clear_caches()
    wrong = run(policy, "mtp", ks)
    assert generated(wrong) == generated(right) and np.any(wrong.stats.cycles != right.stats.cycles)
