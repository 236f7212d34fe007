"""Dynamic sampling (DAPO, arXiv:2503.14476): a group whose answers all have one reward teaches
nothing, and a further prompt takes its place within the step.

What goes on of two rollouts of P prompts each is `kept`: P of their 2 P groups, by number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspec.rl.collate import place_rows
from jspec.sharding import constrain
from jspec.speculate import PromptBatch, Rollout


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
    """The rows of groups of both, int32 [P x n], where `groups` of one have `rows` rows."""
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
