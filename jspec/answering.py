"""Rollouts of any number of prompts on the current mesh, for what is no training step: rows are
filled up until the mesh's shards divide them, placed, decoded, fetched, and what was filled up is
left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jspec.distributed import fetch
from jspec.drafts import Draft
from jspec.model import Policy
from jspec.rl.collate import place_batch
from jspec.sharding import batch_shards, filled, place
from jspec.speculate import PromptBatch, Rollout, rollout
from jspec.speculate.types import BUCKETS


def batch_on_mesh(prompts: Sequence[Sequence[int]], layout: str, *, group_size: int,
                  seed: int | jax.Array, buckets: Sequence[int] = BUCKETS) -> PromptBatch:
    """`PromptBatch.from_tokens` on the current mesh, the first prompts once more at its end where
    `layout` has shards that would not divide the rows. The noise of the others is what it is
    without them."""
    rows = filled(prompts, batch_shards(layout), group_size)
    return placed(PromptBatch.from_tokens(rows, group_size=group_size, seed=seed, buckets=buckets))


def placed(batch: PromptBatch) -> PromptBatch:
    """A batch that every process has whole, on the current mesh if there is one."""
    words, kind = jax.random.key_data(batch.key), jax.random.key_impl(batch.key)
    return place_batch(batch).replace(key=jax.random.wrap_key_data(place(words, "rollout", None),
                                                                   impl=kind))


def decoded(policy: Policy, draft: Draft | None, batch: PromptBatch, rows: int,
            **how: Any) -> Rollout:
    """The first `rows` rows of a rollout, on the host of every process and without routes; `how` is
    `jspec.rollout`'s.
    Counts over all rows (`drafted`, `accepted` and those of loops) are of what fills the batch up
    too."""
    out = fetch(rollout(policy, draft, batch, **how).replace(routes=None, prompt_routes=None))
    stats = out.stats.replace(cycles=out.stats.cycles[:rows])
    return jax.tree.map(lambda x: x[:rows], out.replace(stats=None)).replace(stats=stats)
