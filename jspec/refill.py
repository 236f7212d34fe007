"""Which prompts a step's answers belong to, with over-sampling and the further rollouts of dynamic
sampling (`jspec.rl.groups`), and what is said of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jspec.config import Config
from jspec.rl.collate import collate
from jspec.rl.grading import Grades
from jspec.rl.groups import Drawn, kept, numbered, rows_of, spread
from jspec.rl.prompts import Prompt, PromptData
from jspec.speculate import Rollout
from jspec.step import Further


class Refill:
    """Of one step.

    Attributes:
      prompts: of the groups that go on, so far.
    """

    def __init__(self, config: Config, data: PromptData, key: jax.Array, prompts: Sequence[Prompt],
                 grade: Callable[[Sequence[Prompt], Rollout, Drawn], Grades]) -> None:
        """key, prompts: of the step. grade: of some prompts and their rollout, on the host."""
        self.config, self.data, self.key, self.grade = config, data, key, grade
        self.prompts, self.rewards = list(prompts), []

    def first(self, out: Rollout, drawn: Drawn) -> Grades:
        """Grades of the groups of the first rollout that go on."""
        self.prompts = [self.prompts[i] for i in drawn.kept]
        return self.grade(self.prompts, out, drawn)

    @property
    def asked(self) -> Callable[[Grades], Further | None] | None:
        """`further`, where there may be another rollout at all."""
        return self.further if self.config.data.dynamic_sampling > 1 else None

    def further(self, graded: Grades) -> Further | None:
        """Another rollout, where one is wanted and there may be one: not after as many as
        `data.dynamic_sampling` says, nor of prompts that cannot be used, which end the run after
        this step."""
        if not self.rewards:
            self.rewards.append(graded.rewards)
        if (len(self.rewards) >= self.config.data.dynamic_sampling or self.data.trouble
                or self.has_spread(graded).all()):
            return None
        prompts = next(self.data)
        batch = numbered(collate(self.config, prompts, self.key), len(self.rewards))

        def grade(out: Rollout, drawn: Drawn) -> Grades:
            nonlocal prompts
            prompts = [prompts[i] for i in drawn.kept]
            return self.grade(prompts, out, drawn)

        def keep(first: Grades, second: Grades) -> tuple[np.ndarray, Grades]:
            self.rewards.append(second.rewards)
            index = kept(self.has_spread(first), self.has_spread(second))
            both = [*self.prompts, *prompts]
            self.prompts = [both[i] for i in index]
            return index, first.of_groups(second, rows_of(index, len(index), len(first.rewards)))

        return Further(batch, grade, keep)

    def has_spread(self, graded: Grades) -> np.ndarray:
        return spread(graded.rewards, self.config.data.group_size)

    def record(self) -> dict[str, Any]:
        """Of all groups that were drawn, as the step's metrics have it; nothing where there is
        never more than one rollout."""
        if self.config.data.dynamic_sampling == 1:
            return {}
        drawn = np.concatenate(self.rewards).astype(np.float64)
        differ = spread(drawn, self.config.data.group_size)
        return {"groups_drawn": len(differ), "groups_without_spread": int((~differ).sum()),
                "reward_drawn": float(drawn.mean())}
