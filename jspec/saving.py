"""When a run saves, and where it goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jspec.base_model import BaseModel
from jspec.checkpoint import Checkpoints
from jspec.choosing import Plan
from jspec.clock import Clock
from jspec.config import Config
from jspec.health import Trouble
from jspec.model import Policy
from jspec.prepare import make_draft, make_reference, make_state, needs_reference
from jspec.progress import telling
from jspec.rl.prompts import PromptData
from jspec.rl.state import TrainState


@dataclasses.dataclass(frozen=True)
class Saver:
    """Decides what of a run is kept."""

    config: Config
    checkpoints: Checkpoints
    data: PromptData

    def save(self, step: int, state: TrainState, plan: Plan, found: Sequence[Trouble],
             code: int, record: Mapping[str, Any]) -> float:
        """Save where it is time to. Returns the seconds for which the loop had to wait.

        Weights that ran away are never saved. While updates are skipped a checkpoint waits until
        they go through again; where the run ends before that, its last sound weights are saved, if
        they are not in a checkpoint already.

        Args:
          step: steps done in all.
          found: what was wrong with the last one. code: the exit code that the run ends with now;
            0: it goes on.
          record: the step's metrics: one that is better than any before is saved whenever it comes.
        """
        lost = {trouble.side for trouble in found if trouble.lost}
        if "policy" in lost:
            return 0.0
        last = step == self.config.steps or code > 1
        if not last and any(trouble.side != "reward" for trouble in found):
            skipped = int(state.skipped_in_row) // self.config.grpo.updates_per_step
            if not code or self.checkpoints.newest() >= (1 if lost else step - skipped):
                return 0.0
        elif not (last or code or step % self.config.checkpoint.every == 0
                  or self.checkpoints.better(record)):
            return 0.0
        clock = Clock()
        with clock("checkpoint"):
            self.checkpoints.save(step, state, self.data.state(), plan, record)
        return clock.seconds["checkpoint"]


def begin(config: Config, base: BaseModel, checkpoints: Checkpoints, data: PromptData,
          specs: TrainState) -> tuple[int, TrainState, Policy | None]:
    """(steps done, state, reference): from the latest checkpoint, with `data` set to its position,
    or from the start.

    specs: the state's (`prepare.make_state_specs`). A run that goes on loads no policy that it does
    not need.
    """
    restarts = bool(checkpoints.newest())
    if checkpoints.newest() < config.steps:
        checkpoints.check_room(specs)
    with telling(f"loading {config.model.name}"):
        if not restarts:
            policy = base.policy()
            reference = make_reference(config, policy)
            return 0, make_state(config, policy), reference
        reference = make_reference(config, base.policy()) if needs_reference(config) else None
    done, state, position = checkpoints.restore(specs)
    if config.draft.elsewhere is not None:
        draft = make_draft(config, state.policy)
        state = state.replace(draft=state.draft.replace(weights=draft.weights))
    data.restore(position)
    if data.trouble and done < config.steps:
        raise data.trouble
    return done, state, reference
