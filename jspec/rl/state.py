"""Everything that training carries from one step to the next, as one pytree."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from jspec.drafts import Draft
from jspec.model import Policy


@struct.dataclass
class TrainState:
    """What an update takes and gives back; a checkpoint holds all of it.

    Attributes:
      policy: training layout, float32 masters.
      draft: float32 masters, or None for autoregressive rollouts.
      opt_state, draft_opt_state: of the two optimizers, which share nothing; the latter is () for a draft without
        weights to train.
      updates: int32 scalar, optimizer updates so far, skipped ones included; `updates_per_rollout` of them are a step.
      skipped, draft_skipped: int32 scalars, updates left out for a non-finite loss or gradient.
      skipped_in_row, draft_skipped_in_row: int32 scalars, how many of the latest updates in a row.
      key: the run's typed key. It never changes: a step folds its number into it.
    """

    policy: Policy
    draft: Draft | None
    opt_state: Any
    draft_opt_state: Any
    updates: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    draft_skipped: jax.Array
    draft_skipped_in_row: jax.Array
    key: jax.Array
