"""Answers as the calls of a reward function that grade them, and what a call returned as grades.

Reward processes import this module, so neither it nor what it imports may import jax.
"""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jspec.reward_parts import RewardPart
from jspec.rl.reward_functions import Signature
from jspec.user_code import one_line

SOURCE_NAME = "source_name"
"""What a record of several sources by name says of where it is from."""
LARGEST = float(np.finfo(np.float32).max)
FAILURES = ("raised", "timed_out", "invalid", "died")
"""Why a response scores 0 unjudged: the function raised, ran past the time-out, returned what is no
finite number, or its process ended."""

Grade = tuple[float, str | None, str]
"""(reward, NaN where the function does not apply, kind of failure or None, message)"""


@dataclasses.dataclass(frozen=True)
class RewardInput:
    """One response to grade; a reward function is handed all of it by name.

    Attributes:
        prompt: the prompt's text as its source has it.
        response: what the policy wrote.
        answer: what the source says is right.
        meta: everything else the source says about the prompt.
        finished: the policy ended the response itself; it was not cut off at the longest length.
        length: tokens generated, the end token included.
        group: number of the prompt among the step's; responses of one number follow each other.
        messages: the prompt's messages, each {role, content}, and the response as the last one.
        token_ids: of the response, the end token included.
        prompt_token_ids: what the policy read.
        chat: the same as messages, of a prompt that came as messages.
    """

    prompt: str
    response: str
    answer: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    finished: bool = True
    length: int = 0
    group: int = dataclasses.field(default=0, compare=False)
    messages: Sequence[Mapping[str, Any]] | None = None
    token_ids: Sequence[int] | None = None
    prompt_token_ids: Sequence[int] | None = None
    chat: Sequence[Mapping[str, Any]] | None = None

    @property
    def as_trl(self) -> tuple[Any, Any]:
        """(prompt, completion) as TRL has them: texts, or of a chat each as messages."""
        return ((self.prompt, self.response) if self.chat is None
                else (list(self.chat[:-1]), list(self.chat[-1:])))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a reward function: the answers that it grades, by their places among all, and
    the keyword arguments."""

    rows: Sequence[int]
    arguments: Mapping[str, Any]


def calls_of(part: RewardPart, signature: Signature, items: Sequence[RewardInput],
             max_new_tokens: int) -> list[Call]:
    """The calls that grade those of `items` that are of the part's sources: one an answer, a
    prompt, or one in all."""
    rows = [row for row, item in enumerate(items) if part.grades(item.meta.get(SOURCE_NAME))]
    if not rows:
        return []
    shares = {"answer": lambda: [[row] for row in rows], "batch": lambda: [rows],
              "group": lambda: [list(share) for _, share in itertools.groupby(
                  rows, key=lambda row: items[row].group)]}[signature.kind]()
    return [Call(share, {**told(signature, [items[row] for row in share]),
                         "max_new_tokens": max_new_tokens, **part.options})
            for share in shares]


def told(signature: Signature, items: Sequence[RewardInput]) -> dict[str, Any]:
    """What there is to know of a call's answers. What the prompt says is one value where the
    answers have one prompt, and else a list as well; what an answer has is a list but for a
    function of one answer."""
    def values(*names: str) -> dict[str, list]:
        return {name: [getattr(item, name) for item in items] for name in names}

    keys, wants = dict.fromkeys(key for item in items for key in item.meta), signature.wants
    of_prompt = {**{key: [item.meta.get(key) for item in items] for key in keys},
                 **values("answer", *wants & {"prompt_token_ids"})}
    of_answer = values("finished", "length", *wants & {"messages", "token_ids"})
    prompts, responses = [item.prompt for item in items], [item.response for item in items]
    if "completions" in signature.trl:
        prompts, of_answer["completions"] = map(list, zip(*(item.as_trl for item in items),
                                                          strict=True))
    if "completion_ids" in signature.trl:
        of_answer["completion_ids"] = of_answer["token_ids"]
    if signature.kind == "batch":
        return {**of_prompt, "prompts": prompts, "responses": responses, **of_answer}
    one = {name: values[0] for name, values in of_prompt.items()} | {"prompt": items[0].prompt}
    if signature.kind == "group":
        return {**one, "responses": responses, **of_answer}
    return {**one, "response": responses[0],
            **{name: values[0] for name, values in of_answer.items()}}


def grades_of(signature: Signature, returned: Any, count: int) -> list[Grade]:
    """What a call returned, as the grades of its `count` answers. None of a function of several
    answers: it does not apply to this one; of a function of one answer it is a return that was
    forgotten."""
    if signature.kind == "answer":
        return [grade_of(returned)]
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple) or len(values) != count:
        several = f" of {len(values)}" if isinstance(values, list | tuple) else ""
        message = (f"returned {type(returned).__name__}{several} for {count} answers, and must "
                   "return a list with one number or None for each")
        return [(0.0, "invalid", message)] * count
    return [(math.nan, None, "") if value is None else grade_of(value) for value in values]


def grade_of(value: Any) -> Grade:
    try:
        if isinstance(value, numbers.Real | np.bool_) and abs(float(value)) <= LARGEST:
            return float(value), None, ""
        return (0.0, "invalid",
                f"returned {type(value).__name__} {str(value)[:60]!r}, which is no finite float32")
    except Exception as error:  # of a user's own type, and no fault of the answers beside it
        return failed(error, 1)[0]


def failed(error: BaseException, count: int) -> list[Grade]:
    """The grades of a call that raised."""
    return [(0.0, "raised", one_line(error))] * count


def too_late(part: RewardPart, timeout_s: float, count: int) -> list[Grade]:
    """The grades of a call of a part's function that ran past its time."""
    setting = "reward.timeout_s" if part.timeout_s is None else f"{part.key}.timeout_s"
    return [(0.0, "timed_out", f"took longer than {setting}={timeout_s:g} seconds and was "
             "killed")] * count
