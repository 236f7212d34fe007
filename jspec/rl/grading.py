"""The rewards of a step's rollout, each process grading its own share of the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jspec.rl.answers import reward_inputs
from jspec.rl.prompts import Prompt
from jspec.rl.rewards import FAILURES, RewardPool
from jspec.speculate import Rollout


@dataclasses.dataclass(frozen=True)
class Grades:
    """What grading a step gave; the same on every process.

    Attributes:
      rewards: float32 [N], of all rows.
      failures: for each of `rewards.FAILURES`, how many of the N scored 0 for that reason.
      message: what the first failure on this process said; "": there was none.
      by_name: float32 [N] of each reward function by itself, NaN where it does not apply to a row.
    """

    rewards: np.ndarray
    failures: dict[str, int]
    message: str
    by_name: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> int:
        """How many answers could not be graded."""
        return sum(self.failures.values())

    def record(self) -> dict[str, int]:
        """The failures, as the step's metrics have them."""
        return {"reward_failures": self.failed,
                **{f"reward_failures/{kind}": count for kind, count in self.failures.items()}}


def grade(pool: RewardPool, tokenizer: Any, prompts: Sequence[Prompt], out: Rollout) -> Grades:
    """Grades a rollout that is on the host. All processes call it."""
    rows = np.array_split(np.arange(len(out.lengths)), jax.process_count())[jax.process_index()]
    graded = pool.grade(reward_inputs(tokenizer, prompts, out, rows))
    columns = np.zeros((1 + len(graded.by_name), len(out.lengths)), np.float32)
    columns[:, rows] = [graded.rewards, *graded.by_name.values()]
    counts = np.array([graded.failures[kind] for kind in FAILURES], np.int32)
    if jax.process_count() > 1:
        columns, counts = (multihost_utils.process_allgather(x).sum(0) for x in (columns, counts))
    failures = {kind: int(count) for kind, count in zip(FAILURES, counts, strict=True)}
    return Grades(columns[0], failures, next(iter(graded.messages.values()), ""),
                  dict(zip(graded.by_name, columns[1:], strict=True)))
