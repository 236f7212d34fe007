"""From generated tokens to what is graded."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jspec.rl.rewards import RewardInput

if TYPE_CHECKING:
    from jspec.rl.prompts import Prompt
    from jspec.speculate import Rollout


def reward_inputs(tokenizer: Any, prompts: Sequence[Prompt], out: Rollout,
                  rows: Iterable[int] | None = None,
                  wants: Collection[str] = ()) -> list[RewardInput]:
    """What a reward function is told of each of `rows` (all where none are named) of a rollout on
    the host.

    Row i answers prompt i // group_size, group_size being the rollout's rows over `prompts`.
    wants: what the functions are to be given as well (`Signature.wants`).
    """
    group = len(out.lengths) // len(prompts)
    return [reward_input(tokenizer, prompts[row // group], out, row, int(row) // group, wants)
            for row in (range(len(out.lengths)) if rows is None else rows)]


def reward_input(tokenizer: Any, prompt: Prompt, out: Rollout, row: int, group: int,
                 wants: Collection[str]) -> RewardInput:
    """What a reward function is told of one row, the answer to prompt number `group`."""
    text, more = answer_text(tokenizer, out, row), dict[str, Any]()
    messages = [*prompt.messages, {"role": "assistant", "content": text}]
    if "messages" in wants:
        more["messages"] = messages
    if "chat" in wants and prompt.is_chat:
        more["chat"] = messages
    if "token_ids" in wants:
        more["token_ids"] = out.tokens[row][out.mask[row]].tolist()
    if "prompt_token_ids" in wants:
        more["prompt_token_ids"] = list(prompt.tokens)
    return RewardInput(prompt.text, text, prompt.answer, prompt.meta, bool(out.finished[row]),
                       int(out.lengths[row]), group, **more)


def answer_text(tokenizer: Any, out: Rollout, row: int) -> str:
    """A row's answer as text, without the token that ended it.

    Special tokens stand in it as the tokenizer writes them, and ids for which it has no token as
    U+FFFD: what the policy wrote on either side of them does not become one word, or one number.
    """
    tokens = out.tokens[row][out.mask[row]]
    tokens = tokens[: len(tokens) - int(out.finished[row])].tolist()
    known = [token is not None for token in tokenizer.convert_ids_to_tokens(tokens)]
    runs = itertools.groupby(zip(tokens, known, strict=True), key=lambda pair: pair[1])
    return "".join(tokenizer.decode([token for token, _ in run]) if has_token else "\ufffd"
                   for has_token, run in runs)
