"""What is wrong with a step that taught nothing: named at the first one, with what to do about it.

A run goes on for a while, since a batch may be at fault; it ends where no later step can be better,
and with exit code 1 where its last step still taught nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jspec.config import Config
from jspec.drafts.base import RUN_AWAY, largest
from jspec.model.lora import trained
from jspec.rl.state import TrainState

SAME_STEPS = 5
"""Steps without a difference between two rewards after which that is said."""


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Why a step taught nothing.

    Attributes:
      side: whose it is: "policy", "draft" or "reward".
      what: is wrong, and since when. remedy: what to do about it.
      final: no later step can be better, or enough of them were waited for: the run ends.
      lost: the side's weights are of no use any more.
    """

    side: str
    what: str
    remedy: str
    final: bool = False
    lost: bool = False

    def __str__(self) -> str:
        return f"ALARM: {self.what}: {self.remedy}"


def troubles(config: Config, state: TrainState, learned: dict[str, Any], rewardless: str,
             in_row: int) -> list[Trouble]:
    """What is wrong with the step that made `state`; the same on every process.

    Args:
      learned: the update's record.
      rewardless: why the step's rewards teach nothing; "": they may.
      in_row: of how many of the latest steps that is so.
    """
    found, limit = [], config.grpo.max_skipped
    if rewardless:
        waited = in_row >= limit
        found.append(Trouble(
            "reward", f"{rewardless} ({in_row} steps in a row)" if in_row > 1 else rewardless,
            "look at reward.function and at data.source, not at the learning rate"
            + f"; grpo.max_skipped={limit} such steps in a row: stopping" * waited, final=waited))
    if learned["skipped_in_row"] or not float(largest(trained(state.policy))) < RUN_AWAY:
        found.append(_skipped(config, "policy", trained(state.policy), learned, "",
                              int(state.updates)))
    if learned["draft_skipped_in_row"] or learned.get("draft_finite") is False:
        found.append(_skipped(config, "draft", state.draft.weights, learned, "draft_",
                              int(state.updates)))
    return found


def _skipped(config: Config, side: str, weights: Any, learned: dict[str, Any], prefix: str,
             updates: int) -> Trouble:
    """The trouble with an update that was left out for a loss or a gradient that is not finite, or
    with one that made weights of which the next will be."""
    in_row, limit = learned[f"{prefix}skipped_in_row"], config.grpo.max_skipped
    what = f"the {side}'s weights are of no use any more" if not in_row else (
        f"the {side}'s loss or gradient was not finite: update skipped ({in_row} in a row, "
        f"{learned[f'{prefix}skipped']} in all)")
    size, section = float(largest(weights)), "grpo" if side == "policy" else "draft"
    lost = not size < RUN_AWAY
    source = config.model.name if side == "policy" else config.draft.path
    if not lost:
        remedy = (f"its weights are sound (at most {size:.3g}), so it is not the learning rate; "
                  "look at the step's rewards and prompts, at logprob_gap, entropy and kl in "
                  "metrics.jsonl, and at model.dtype")
    elif learned[f"{prefix}skipped"] == updates and source not in ("random", None):
        remedy = (f"its weights are not sound (up to {size:.3g}) as they come from {source}; take "
                  "another")
    else:
        setting = config.grpo if side == "policy" else config.draft
        remedy = (f"its weights have run away (up to {size:.3g}); lower {section}.learning_rate="
                  f"{setting.learning_rate:g} or {section}.clip={setting.clip:g}")
    waited = in_row >= limit
    return Trouble(side, what, remedy + f"; grpo.max_skipped={limit} such updates in a row: "
                   "stopping" * waited, final=waited or (lost and side == "policy"), lost=lost)


def all_failed(rewards: np.ndarray, failures: int, message: str = "") -> str:
    """What is wrong if no answer of a step could be graded; "" if one was."""
    if failures < len(rewards):
        return ""
    return (f"the reward failed for every one of the step's {len(rewards)} "
            f"answers{message and f' ({message})'}")


def never_taught(records: Sequence[Mapping[str, Any]]) -> str:
    """What to say if in a run's first SAME_STEPS steps no answer was in the loss, or no two answers
    to one prompt had different rewards; "" at any other time.

    Args:
      records: of all steps until now, as metrics.jsonl has them.
    """
    if len(records) != SAME_STEPS:
        return ""
    # of both, what an earlier jspec wrote may not say it
    if not any(record.get("trained_tokens", 1) for record in records):
        return (f"no answer of the first {SAME_STEPS} steps ended before the cap, and "
                "grpo.mask_truncated leaves those that reach it out of the loss, so nothing is "
                "learned: raise sampling.max_new_tokens, or set grpo.mask_truncated=false")
    if any(record.get("reward_differs", 1) or record["reward_failures"] for record in records):
        return ""
    rewards = {record["reward"] for record in records}
    same = (f"every answer of the first {SAME_STEPS} steps has the reward {rewards.pop():g}"
            if len(rewards) == 1
            else f"in the first {SAME_STEPS} steps all answers to a prompt have one reward")
    return (f"{same}, and where rewards do not differ nothing is learned: look at what "
            "reward.function gives, and at how hard data.source is")
