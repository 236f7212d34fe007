"""Sums by hand: what would still fit."""

import types

import pytest

from jspec.scale.largest import largest
from jspec.scale.memory import Pools
from jspec.speculate.blocks import Blocks

GIB = 2**30


def programs(rollout, update):
    """needed, temporaries of each, in GiB."""
    made = {}
    for name, (needed, temporaries) in {"rollout": rollout, "update": update}.items():
        made[name] = types.SimpleNamespace(needed=int(needed * GIB),
                                           kinds={"temporaries": int(temporaries * GIB)})
    return made


def pools(slots, kv_tokens=None):
    """Of two shards; 64 rows on four prompts of one block, answers of up to eight blocks of 128; a
    block is 1 MiB."""
    counts = Blocks.of(2, 128, 7 * 128, 0)
    assert (counts.size, counts.row, counts.prompts) == (128, 8, 2)
    return Pools(counts, (2**20, 0), slots, 2, kv_tokens, (128,))


def answer(rollout, update, slots=32, granted=2.0, kv_tokens=None):
    return largest(programs(rollout, update), pools(slots, kv_tokens), micro_batch=4, rows=64,
                   shards=2, fixed=GIB, granted=int(granted * GIB))


def test_more_slots_take_a_larger_pool_and_larger_temporaries():
    """A slot of a shard takes 8 MiB of pool, and its part of 16 x 4 MiB temporaries: 12 MiB."""
    found = answer(rollout=(1.0, 64 / 1024), update=(1.0, 0))
    assert found.slots == 64  # 16 more of each shard would take 192 MiB: all rows fit
    assert answer(rollout=(1.9, 64 / 1024), update=(1.0, 0)).slots == 32 + 2 * 8
    assert answer(rollout=(2.05, 64 / 1024), update=(1.0, 0)).slots == 32 - 2 * 5
    assert answer(rollout=(4.0, 0), update=(1.0, 0)).slots == 0


def test_positions_are_whole_blocks_of_all_shards():
    assert answer(rollout=(1.0, 0), update=(1.0, 0)).kv_tokens is None  # the worst case fits
    # 130 blocks are there, and 51 MiB of it are too many
    assert answer(rollout=(2.05, 0), update=(1.0, 0)).kv_tokens == (130 - 52) * 128 * 2
    assert answer(rollout=(4.0, 0), update=(1.0, 0)).kv_tokens == 0


@pytest.mark.parametrize(("update", "expected"), [((1.75, 1.25), 8), ((1.5, 1.5), 8),
                                                   ((2.25, 1.5), 2), ((3.5, 1.0), 0)])
def test_temporaries_but_for_the_gradients_grow_with_the_micro_batch(update, expected):
    """1 GiB of gradients stays; the rest is four rows'. It must divide the rows."""
    assert answer(rollout=(1.0, 0), update=update).micro_batch == expected
