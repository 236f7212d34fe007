"""Micro-batches of like length: every row that has a trained token once, whole, with its own
prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspec.rl import micro_batches as mb
from jspec.rl.batch import TrainBatch

FULL = 12


def make_batch(prompts, group, lengths=None):
    """Row i has i as its advantage and tokens, prompt j is j."""
    rng, n = np.random.default_rng(prompts * group), prompts * group
    lengths = rng.integers(0, FULL + 1, n) if lengths is None else np.resize(lengths, n)
    own, ours = jnp.arange(n, dtype=jnp.int32), jnp.arange(prompts, dtype=jnp.int32)
    tokens = jnp.broadcast_to(own[:, None], (n, FULL))
    mask = jnp.arange(FULL) < jnp.asarray(lengths)[:, None]
    return TrainBatch(ours[:, None], ours, tokens, tokens.astype(jnp.float32),
                      mask & (tokens % 3 != jnp.arange(FULL)), own.astype(jnp.float32))


def check(batch, cut):
    """What micro-batches give together is what the batch holds."""
    n, prompts = batch.tokens.shape[0], batch.prompts.shape[0]

    def one(micro):
        rows = micro.rows
        width = rows.tokens.shape[1]
        tokens = jnp.zeros(n, int).at[rows.tokens[:, 0]].add(rows.mask.sum(1))
        blocks = jnp.arange(micro.prompts.shape[0])[:, None] * (prompts // micro.prompts.shape[0])
        mixed = (rows.tokens.astype(jnp.float32) != rows.advantages[:, None]).sum()
        mixed += (rows.prompts[:, 0] != rows.prompt_lengths).sum()
        astray = (rows.prompt_lengths != rows.tokens[:, 0] // batch.group_size).sum()
        astray += ((micro.prompts + blocks).reshape(-1) != rows.prompt_lengths).sum()
        return (tokens, jnp.array([rows.tokens.size])), (mixed + astray, jnp.array(width))

    (tokens,
     computed), (wrong, widest) = jax.jit(lambda batch: mb.accumulate(one, batch, cut))(batch)
    np.testing.assert_array_equal(tokens, batch.mask.sum(1))
    assert wrong == 0
    return int(computed[0]), int(widest)


@pytest.mark.parametrize("prompts, group, shards, micro_batch, widths", [
    (2, 4, 1, 0, ()), (2, 4, 1, 3, (8, 5, 2)), (4, 3, 2, 4, (7, 3)), (4, 4, 4, 4, (6,)),
    (1, 8, 4, 4, (9, 4)), (3, 8, 2, 6, (4, 1)), (8, 2, 8, 8, (1, 2, 3))])
def test_every_row_once_with_its_prompt(prompts, group, shards, micro_batch, widths, monkeypatch):
    monkeypatch.setattr(mb, "batch_shards", lambda layout: shards)
    monkeypatch.setattr(mb, "least_tokens", lambda: 8)
    batch = make_batch(prompts, group)
    cut = mb.shapes(batch, micro_batch, widths)
    blocks = shards if prompts % shards == 0 else 1
    assert all(rows * blocks % shards == 0 for rows, _ in cut)  # every device has its share
    assert [width for _, width in cut] == sorted({FULL, *widths}, reverse=True)
    check(batch, cut)


def test_what_is_computed_follows_the_lengths(monkeypatch):
    monkeypatch.setattr(mb, "least_tokens", lambda: 1)
    for lengths, computed, widest in (([12], 8 * 12, 12), ([3], 8 * 4, 4),
                                      ([4, 5], 4 * 4 + 4 * 8, 8), ([0], 0, 0),
                                      ([12] + [1] * 7, 2 * 12 + 6 * 4, 12)):
        batch = make_batch(2, 4, lengths)
        batch = batch.replace(mask=jnp.arange(FULL) < jnp.asarray(np.resize(lengths, 8))[:, None])
        assert check(batch, mb.shapes(batch, 2, (8, 4))) == (computed, widest), lengths


def unmasked(batch, order, done, rows, width):
    """Rows that fill the last micro-batch up count again."""
    made = take(batch, order, done, rows, width)
    index = order[:, jnp.minimum(done + jnp.arange(rows), order.shape[1] - 1)]
    return made.replace(rows=made.rows.replace(mask=mb.block_rows(batch.mask[:, :width], index)))


def too_narrow(batch, order, done, rows, width):
    """Trimmed to less than the longest row."""
    made = take(batch, order, done, rows, width)
    return made.replace(rows=made.rows.replace(mask=made.rows.mask
                                               & (jnp.arange(width) < width - 1)))


def of_a_siblings_prompt(batch, order, done, rows, width):
    """The i-th row of the order takes the prompt of the i-th row of the batch."""
    made = take(batch, order, done, rows, width)
    place = jnp.minimum(done + jnp.arange(rows), order.shape[1] - 1)
    return made.replace(prompts=jnp.broadcast_to(place // batch.group_size, made.prompts.shape))


take = mb.take


@pytest.mark.parametrize("planted", [unmasked, too_narrow, of_a_siblings_prompt])
def test_planted_faults_are_caught(planted, monkeypatch):
    monkeypatch.setattr(mb, "batch_shards", lambda layout: 2)
    batch, cut = make_batch(4, 3), ((4, FULL), (4, 7), (5, 3))
    check(batch, cut)
    monkeypatch.setattr(mb, "take", planted)
    with pytest.raises(AssertionError):
        check(batch, cut)


@pytest.mark.parametrize("longest, widths", [
    (6, (6,)), (64, (64,)), (128, (128, 80, 64)), (512, (512, 336, 224, 144, 96, 64)),
    (4096, (4096, 2688, 1792, 1152, 768, 512))])
def test_usual_widths(longest, widths):
    assert mb.usual_widths(longest) == widths
