"""From generated tokens to what is graded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jspec.rl.rewards import RewardInput

if TYPE_CHECKING:
    from jspec.rl.prompts import Prompt
    from jspec.speculate import Rollout


def reward_inputs(tokenizer: Any, prompts: Sequence[Prompt], out: Rollout,
                  rows: Iterable[int] | None = None) -> list[RewardInput]:
    """What a reward function is told of each of `rows` (all where none are named) of a rollout on the host.

    Row i answers prompt i // group_size, group_size being the rollout's rows over `prompts`.
    """
    group = len(out.lengths) // len(prompts)
    asked = ((row, prompts[row // group]) for row in (range(len(out.lengths)) if rows is None else rows))
    return [RewardInput(prompt.text, answer_text(tokenizer, out, row), prompt.answer, prompt.meta,
                        bool(out.finished[row]), int(out.lengths[row])) for row, prompt in asked]


def answer_text(tokenizer: Any, out: Rollout, row: int) -> str:
    """A row's answer as text, without the token that ended it."""
    tokens = out.tokens[row][out.mask[row]]
    return tokenizer.decode(tokens[: len(tokens) - int(out.finished[row])], skip_special_tokens=True)
