"""A step's prompts, as the batch that its rollout continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jspec.config import Config
from jspec.rl.prompts import Prompt
from jspec.sharding import place
from jspec.speculate import PromptBatch
from jspec.speculate.types import BUCKETS


def collate(config: Config, prompts: Sequence[Prompt], key: jax.Array) -> PromptBatch:
    """The step's prompts on the mesh. Every process has them all and makes the rows that its
    devices hold.

    key: the step's typed key.
    """
    longest, expected = config.data.max_prompt_tokens, None
    # the rollouts of a step are merged, so they are to be of one shape
    shorter = () if config.data.dynamic_sampling > 1 else (b for b in BUCKETS if b < longest)
    if may_wait(config):  # an answer of which nothing is known may become as long as any
        expected = [config.sampling.max_new_tokens if prompt.expected_length is None
                    else prompt.expected_length for prompt in prompts]
    batch = PromptBatch.from_tokens([prompt.tokens for prompt in prompts],
                                    group_size=config.data.group_size, seed=key,
                                    buckets=(*shorter, longest),
                                    expected_lengths=expected)
    return place_batch(batch)


def place_batch(batch: PromptBatch) -> PromptBatch:
    """A batch that every process has whole, with its rows split over the mesh; its key is left as
    it is."""
    rows = {name: getattr(batch, name)
            for name in ("tokens", "lengths", "sequence_ids", "expected_lengths")}
    return batch.replace(**{name: place_rows(x) for name, x in rows.items() if x is not None})


def place_rows(x: Any) -> jax.Array:
    """An array that every process has whole, with its rows split over the mesh."""
    return place(x, "rollout", "batch", *(None,) * (np.ndim(x) - 1))


def may_wait(config: Config) -> bool:
    """Whether answers of a step may have to wait for others to end: then those that will be long
    begin first."""
    return config.rollout.slots is not None or config.rollout.kv_tokens is not None
