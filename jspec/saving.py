"""When a run saves, where it goes on from, and what it does with weights that ran away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jspec.base_model import BaseModel
from jspec.checkpoint import Checkpoints
from jspec.choosing import Plan
from jspec.config import Config
from jspec.health import Trouble
from jspec.metrics import Clock
from jspec.model import Policy
from jspec.prepare import make_reference, make_state
from jspec.progress import telling
from jspec.rl.prompts import PromptData
from jspec.rl.state import TrainState


@dataclasses.dataclass(frozen=True)
class Saver:
    """Decides what of a run is kept. `say` prints a line."""

    config: Config
    checkpoints: Checkpoints
    data: PromptData
    say: Callable[[str], None]

    def save(self, step: int, state: TrainState, plan: Plan, found: Sequence[Trouble], code: int) -> float:
        """Save where it is time to. Returns the seconds for which the loop had to wait.

        Weights that ran away are finite at first: a checkpoint waits until the updates go through again. Where the run
        ends before that, its last sound weights are saved, if they are not in a checkpoint already.

        Args:
          step: steps done in all.
          found: what was wrong with the last one. code: the exit code that the run ends with now; 0: it goes on.
        """
        lost = {trouble.side for trouble in found if trouble.lost}
        if "policy" in lost:
            self.withdraw(step - 1, state)
            return 0.0
        last = step == self.config.steps or code > 1
        if not last and any(trouble.side != "reward" for trouble in found):
            skipped = int(state.skipped_in_row) // self.config.grpo.updates_per_rollout
            if not code or self.checkpoints.newest() >= (1 if lost else step - skipped):
                return 0.0
        elif not (last or code or step % self.config.checkpoint.every == 0):
            return 0.0
        clock = Clock()
        with clock("checkpoint"):
            self.checkpoints.save(step, state, self.data.state(), plan)
        return clock.seconds["checkpoint"]

    def withdraw(self, step: int, state: TrainState) -> None:
        """Set the checkpoint of weights that ran away aside, where there is an earlier one to go on from."""
        # else other weights began this step
        skipped = int(state.skipped_in_row) >= self.config.grpo.updates_per_rollout
        if skipped and self.checkpoints.newest() == step and len(self.checkpoints.manager.all_steps()) > 1:
            self.say(f"the checkpoint of step {step} holds the weights that have run away: set aside")
            self.checkpoints.set_aside(step)


def begin(config: Config, base: BaseModel, checkpoints: Checkpoints, data: PromptData, specs: TrainState
          ) -> tuple[int, TrainState, Policy | None]:
    """(steps done, state, reference): from the latest checkpoint, with `data` set to its position, or from the start.

    specs: the state's (`prepare.make_state_specs`). A run that goes on loads no policy that it does not need.
    """
    restarts = bool(checkpoints.newest())
    if checkpoints.newest() < config.steps:
        checkpoints.check_room(specs)
    with telling(f"loading {config.model.name}"):
        if not restarts:
            policy = base.policy()
            reference = make_reference(config, policy)
            return 0, make_state(config, policy), reference
        reference = make_reference(config, base.policy()) if config.grpo.kl_weight else None
    done, state, position = checkpoints.restore(specs)
    data.restore(position)
    if data.trouble and done < config.steps:
        raise data.trouble
    return done, state, reference
