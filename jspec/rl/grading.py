"""The rewards of a step's rollout, each process grading its own share of the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
      failures: for each of `rewards.FAILURES`, how often an answer scored 0 for that reason.
      message: what the first failure on this process said; "": there was none.
      by_name: float32 [N] of each reward function by itself, NaN where it does not apply to a row.
      failed: how many of the N a function with a weight could not grade. ungraded: how many of
        them none could. failed_rows: bool [N], which they are; None: nobody asked.
    """

    rewards: np.ndarray
    failures: dict[str, int]
    message: str
    by_name: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    failed: int = 0
    ungraded: int = 0
    failed_rows: np.ndarray | None = None

    def of_groups(self, other: Grades, rows: np.ndarray) -> Grades:
        """Of those rows int [N], which count through this rollout's and then the other's, with the
        failures of both."""
        def joined(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.concatenate([x, y])[rows]

        return Grades(joined(self.rewards, other.rewards),
                      {kind: count + other.failures[kind] for kind, count in self.failures.items()},
                      self.message or other.message,
                      {name: joined(x, other.by_name[name]) for name, x in self.by_name.items()},
                      self.failed + other.failed, min(self.ungraded, other.ungraded),
                      None if self.failed_rows is None
                      else joined(self.failed_rows, other.failed_rows))

    def record(self) -> dict[str, int | float | None]:
        """The failures, as the step's metrics have them, and where there are several functions the
        mean and deviation of each over the answers that it applies to."""
        record: dict[str, int | float | None] = {
            "reward_failures": self.failed,
            **{f"reward_failures/{kind}": count for kind, count in self.failures.items()}}
        if len(self.by_name) < 2:
            return record
        record["reward_ungraded"] = self.ungraded
        for name, values in self.by_name.items():
            values = values[~np.isnan(values)].astype(np.float64)
            record |= {f"reward/{name}": float(values.mean()) if values.size else None,
                       f"reward_std/{name}": float(values.std()) if values.size else None}
        return record


def ungraded(record: Mapping[str, Any]) -> int | None:
    """How many answers of a step no reward function could grade, of its record in metrics.jsonl;
    None where an earlier jspec did not say it."""
    return record.get("reward_ungraded", record.get("reward_failures"))


def grade(pool: RewardPool, tokenizer: Any, prompts: Sequence[Prompt], out: Rollout) -> Grades:
    """Grades a rollout that is on the host. All processes call it."""
    unit = len(out.lengths) // len(prompts) if pool.whole_groups else 1
    rows = np.array_split(np.arange(len(out.lengths)).reshape(-1, unit),
                          jax.process_count())[jax.process_index()].reshape(-1)
    graded = pool.grade(reward_inputs(tokenizer, prompts, out, rows, pool.wants))
    columns = np.zeros((2 + len(graded.by_name), len(out.lengths)), np.float32)
    failed = 0 * graded.rewards if graded.failed_rows is None else graded.failed_rows
    columns[:, rows] = [graded.rewards, *graded.by_name.values(), failed]
    counts = np.array([graded.failed, graded.ungraded,
                       *(graded.failures[kind] for kind in FAILURES)], np.int32)
    if jax.process_count() > 1:
        columns, counts = (multihost_utils.process_allgather(x).sum(0) for x in (columns, counts))
    failed, ungraded, *failures = counts.tolist()
    return Grades(columns[0], dict(zip(FAILURES, failures, strict=True)),
                  next(iter(graded.messages.values()), ""),
                  dict(zip(graded.by_name, columns[1:-1], strict=True)), failed, ungraded,
                  columns[-1] > 0)
