"""A step in numbers, and some of its answers in full: what of it is kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jspec.clock import Clock
from jspec.drafts import Draft
from jspec.drafts.base import RUN_AWAY, largest
from jspec.rl.answers import answer_text
from jspec.rl.grading import Grades
from jspec.rl.groups import Drawn
from jspec.rl.prompts import Prompt, PromptData
from jspec.rl.update_settings import UpdateSettings, trains_draft
from jspec.run_files import Sample
from jspec.speculate import Rollout
from jspec.step import Taken


def described(out: Rollout, rewards: np.ndarray, group_size: int, clock: Clock) -> dict[str, Any]:
    """The rollout, on the host, and the rewards float32 [N] of its groups, in numbers."""
    stats, tokens = out.stats, int(out.lengths.sum())
    rewards = rewards.astype(np.float64)  # the squares of large ones are beyond float32
    record = {"reward": float(rewards.mean()), "reward_std": float(rewards.std()),
              "reward_differs": float((np.ptp(rewards.reshape(-1, group_size), axis=1) > 0).mean()),
              "length": float(out.lengths.mean()), "finished": float(out.finished.mean()),
              "tokens": tokens,
              # of a rollout that was compiled first it would be no rate
              "tokens_per_second": None if clock.compiling["rollout"]
              else round(tokens / clock.seconds["rollout"], 2),
              "acceptance_length": tokens / int(stats.cycles.sum()),
              "occupancy": float(stats.occupancy), "kv_blocks": int(stats.blocks.max()),
              "pauses": int(stats.pauses.sum()), "loop_rows": list(stats.slots),
              "loop_k": list(stats.ks), "loop_cycles": stats.loop_cycles.sum(0).tolist()}
    if stats.drafted.sum():
        record["drafted"] = int(stats.drafted.sum())
        record["acceptance"] = float(stats.accepted.sum() / stats.drafted.sum())
        record["acceptance_by_position"] = (stats.accepted / np.maximum(stats.drafted, 1)).tolist()
    return record


def learned(taken: Taken) -> dict[str, Any]:
    """What policy and draft learned: means over the step's updates, as plain numbers."""
    first, last = taken.updates[0], taken.updates[-1]
    record = {name: np.mean([metrics[name] for metrics in taken.updates], axis=0).tolist()
              for name in first if taken.draft_learned or not name.startswith("draft/")}
    # counts are those of the last update; the gap to the verifier means something at the first one
    # only
    record |= {name: float(first[name]) for name in first
               if name.startswith("logprob_gap") or name == "route_flip_rate"}
    record |= {name: int(value) for name, value in last.items() if "skipped" in name}
    return record | {name: value.tolist() for name, value in taken.draft.items()}


def of_prompts(data: PromptData, prompts: Sequence[Prompt], taken: Taken) -> dict[str, Any]:
    """What a step says of where its prompts are from: of each of several sources how many they
    are, and mean reward and length of the answers to them. Of all prompts how many are left out as
    too long, where they may be, and how hard they are, where a curriculum goes by that."""
    record: dict[str, Any] = {} if data.curriculum is None else dict(data.curriculum.difficulties())
    if data.config.too_long == "skip":
        record["prompts_left_out"] = data.left_out
    rewards = taken.graded.rewards.reshape(len(prompts), -1).astype(np.float64)
    lengths = taken.rollout.lengths.reshape(len(prompts), -1)
    for name in (part.name for part in data.records.parts if part.name):
        mine = np.array([prompt.source == name for prompt in prompts])
        some = bool(mine.any())
        record |= {f"source/{name}/prompts": int(mine.sum()),
                   f"source/{name}/reward": float(rewards[mine].mean()) if some else None,
                   f"source/{name}/length": float(lengths[mine].mean()) if some else None}
    return record


def dropped(drawn: Sequence[Drawn]) -> dict[str, int | float | None]:
    """What over-sampling has left off, and how long it was beside what goes on. Dropped answers
    count as they were when their rollout ended, so `length_dropped` is the least that they would
    have had; those that had to wait and were never begun have none. Nothing where all goes on."""
    parts = [(np.isin(np.arange(len(one.lengths)), one.kept), one) for one in drawn]
    lengths = np.concatenate([one.lengths[~kept] for kept, one in parts])
    if not len(lengths):
        return {}
    begun = lengths[lengths > 0]
    return {"groups_dropped": len(lengths),
            "length_dropped": float(begun.mean()) if begun.size else None,
            "length_kept": float(np.mean([one.lengths[kept].mean() for kept, one in parts])),
            "dropped_unfinished": float(np.mean(np.concatenate([~one.done[~kept]
                                                                for kept, one in parts])))}


def draft_health(draft: Draft | None, settings: UpdateSettings) -> dict[str, bool]:
    """Whether the weights of a draft that is trained are finite, and what they compute can be."""
    return ({"draft_finite": float(largest(draft.weights)) < RUN_AWAY}
            if trains_draft(draft, settings) else {})


def samples(step: int, count: int, tokenizer: Any, prompts: Sequence[Prompt], out: Rollout,
            grades: Grades) -> list[Sample]:
    """The first `count` answers of a step, as JSON can hold them; `out` is on the host. A sample's
    `accepted` is what its cycles yielded beyond a token each: the drafts that were accepted. Of
    several sources it says its own."""
    group, kept, failed = len(out.lengths) // len(prompts), [], grades.failed_rows
    for row in range(min(count, len(out.lengths))):
        prompt, length, cycles = prompts[row // group], *(int(x[row]) for x in (out.lengths,
                                                                                out.stats.cycles))
        rewards = {name: None if np.isnan(column[row]) else float(column[row])
                   for name, column in grades.by_name.items()}
        source = {"source": prompt.source} if prompt.source else {}
        kept.append({"step": step, "sample": row, **source, "prompt": prompt.text,
                     "response": answer_text(tokenizer, out, row), "answer": prompt.answer,
                     "reward": float(grades.rewards[row]), "rewards": rewards, "length": length,
                     "finished": bool(out.finished[row]),
                     "failed": failed is not None and bool(failed[row]), "cycles": cycles,
                     "accepted": length - cycles})
    return kept
