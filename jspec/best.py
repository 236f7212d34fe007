"""Which checkpoint is the best by a metric: each has those of its step beside it, so that whichever
are left say it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp

Worth = Callable[[Mapping[str, Any]], float]


def worth(metric: str | None, best_is: str) -> Worth | None:
    """What a checkpoint with these metrics is worth by one of them: the more the better, and
    -infinity where it does not have it. None where no metric is named."""
    def of(metrics: Mapping[str, Any]) -> float:
        value = numbers(metrics).get(metric or "")
        return -math.inf if value is None else -value if best_is == "min" else value

    return of if metric else None


def unknown(metric: str | None, first: Mapping[str, Any]) -> str:
    """What to say of a metric that the record of the first step after a start does not have; "" if
    it does, or comes with an evaluation."""
    if metric is None or metric in numbers(first) or metric.startswith("eval/"):
        return ""
    near = difflib.get_close_matches(metric, numbers(first), n=1)
    return (f"checkpoint.best={metric} is no number of the record of step {first['step']}"
            f"{f'; did you mean {near[0]}?' if near else ''}: until a step has it there is no best")


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a step's metrics, which are what JSON can hold."""
    return {name: value for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)}


def most(manager: ocp.CheckpointManager, of: Worth | None) -> float:
    """What a manager's best checkpoint is worth; -infinity: none has the metric."""
    return max((of(manager.metrics(step) or {}) for step in manager.all_steps()),
               default=-math.inf) if of else -math.inf


def best_step(manager: ocp.CheckpointManager, of: Worth | None) -> int:
    """The step of a manager's best checkpoint, the newest of those that are level; 0: none has the
    metric."""
    values = {step: of(manager.metrics(step) or {}) for step in manager.all_steps()} if of else {}
    step = max(values, key=lambda step: (values[step], step), default=0)
    return step if values and values[step] > -math.inf else 0
