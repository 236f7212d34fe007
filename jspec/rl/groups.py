"""Which groups of a step's rollouts go on.

Over-sampling: of each rollout the groups that are done (`Drawn`). Dynamic sampling (DAPO,
arXiv:2503.14476): a group whose answers all have one reward teaches nothing, and a further prompt
takes its place within the step; what goes on of two rollouts of P groups each is `kept`: P of their
2 P, by number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jspec.rl.collate import place_rows
from jspec.sharding import block_rows, constrain
from jspec.speculate import PromptBatch, Rollout


class Drawn(NamedTuple):
    """A rollout when it ended, on the host.

    Attributes:
      lengths: int32 [P, n], of the answers to each prompt, so far. done: bool [P, n], which of them
        are whole.
      kept: int32, ascending: the groups that go on.
    """

    lengths: np.ndarray
    done: np.ndarray
    kept: np.ndarray

    @classmethod
    def of(cls, out: Rollout, prompts: int, groups: int | None, shards: int) -> Drawn:
        """Of a rollout of so many prompts: the first `groups` that are done, in the order in which
        they were drawn, of each shard of the batch axes its share; None: all."""
        lengths, done = (x.reshape(prompts, -1) for x in (out.lengths, out.done))
        first = np.argsort(~done.all(1).reshape(shards, -1), axis=1, kind="stable")
        first = np.sort(first[:, :(groups or prompts) // shards], axis=1)
        kept = first + prompts // shards * np.arange(shards)[:, None]
        return cls(lengths, done, kept.reshape(-1).astype(np.int32))


def picked(prompts: PromptBatch, out: Rollout, kept: jax.Array,
           shards: int) -> tuple[PromptBatch, Rollout]:
    """The groups `kept` of a rollout without statistics, with their prompts; as many of every
    shard, where its rows lie. Jittable."""
    groups = prompts.tokens.shape[0]
    local = kept.reshape(shards, -1) % (groups // shards)

    def of_rows(x: jax.Array) -> jax.Array:
        taken = block_rows(x.reshape(groups, -1, *x.shape[1:]), local)
        return constrain(taken.reshape(-1, *x.shape[1:]), "rollout", "batch",
                         *(None,) * (x.ndim - 1))

    rest, out = jax.tree.map(of_rows, (prompts.replace(key=None), out))
    return rest.replace(key=prompts.key), out


def picked_on_host(out: Rollout, drawn: Drawn) -> Rollout:
    """The same of a rollout on the host: `RolloutStats` are of all of it, but for the rows' own."""
    groups = len(drawn.lengths)

    def of_rows(x: np.ndarray) -> np.ndarray:
        return x[rows_of(drawn.kept, groups, len(x))]

    rest = jax.tree.map(of_rows, out.replace(stats=None))
    return rest.replace(stats=out.stats.replace(cycles=of_rows(out.stats.cycles)))


def spread(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """Which groups have answers of different rewards, bool [P], of rewards [P x group_size]."""
    return np.ptp(rewards.reshape(-1, group_size), axis=1) > 0


def kept(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The groups that go on, int32 [P], ascending: those with a spread, bool [P] of either, in the
    order in which they were drawn, and as many others as there is room for, in that order."""
    has = np.concatenate([first, second])
    order = np.argsort(~has, kind="stable")[:len(first)]
    return np.sort(order).astype(np.int32)


def rows_of(index: Any, groups: int, rows: int) -> Any:
    """The rows of some groups, of one rollout or of two after each other, int32; `groups` of them
    have `rows` rows."""
    each = rows // groups
    return (index[:, None] * each + np.arange(each, dtype=np.int32)).reshape(-1)


def merged(first: tuple[PromptBatch, Rollout], second: tuple[PromptBatch, Rollout],
           index: jax.Array) -> tuple[PromptBatch, Rollout]:
    """The groups of `index` (`kept`) of two rollouts without statistics, each with its prompts.
    Jittable; shapes stay as they are, and rows on the shards where rows lie."""
    groups = first[0].tokens.shape[0]

    def of_rows(x: jax.Array, y: jax.Array) -> jax.Array:
        rows = rows_of(index, groups, x.shape[0])
        both = jnp.take(jnp.concatenate([x, y]), rows, axis=0)
        return constrain(both, "rollout", "batch", *(None,) * (x.ndim - 1))

    key = first[0].key
    prompts, out = jax.tree.map(of_rows, *((prompts.replace(key=None), out)
                                           for prompts, out in (first, second)))
    return prompts.replace(key=key), out


def merged_on_host(first: Rollout, second: Rollout, index: np.ndarray) -> Rollout:
    """`merged`, of rollouts on the host: `RolloutStats` are of both rollouts, but for the rows'
    own."""
    groups = len(index)

    def of_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.concatenate([x, y])[rows_of(index, groups, len(x))]

    stats = first.stats.replace(
        cycles=of_rows(first.stats.cycles, second.stats.cycles),
        blocks=np.maximum(first.stats.blocks, second.stats.blocks),
        **{name: getattr(first.stats, name) + getattr(second.stats, name)
           for name in ("drafted", "accepted", "loop_cycles", "loop_live", "pauses")})
    rest = jax.tree.map(of_rows, first.replace(stats=None), second.replace(stats=None))
    return rest.replace(stats=stats)


def numbered(batch: PromptBatch, rollout: int) -> PromptBatch:
    """The prompts of a step's `rollout`-th further rollout: sequences with noise of their own under
    the step's key."""
    ids = np.arange(batch.sequence_ids.shape[0], dtype=np.int32)
    return batch.replace(sequence_ids=place_rows(ids + np.int32(rollout * len(ids))))
