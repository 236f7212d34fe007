"""Reward functions: those that ship, those of users, and how each wants to be called.

Reward processes import this module, so neither it nor what it imports may import jax.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jspec import user_code
from jspec.choices import MAX_NEW_TOKENS
from jspec.errors import InputError
from jspec.reward_parts import RewardPart, reward_parts
from jspec.rl import tasks
from jspec.rl.math_grading import check_gold, math_verify

Reward = Callable[..., Any]
PLURAL = {"prompts", "responses", "completions", "completion_ids"}
"""A function that names one of these is given several answers at once."""

ON_REQUEST = ("messages", "token_ids", "prompt_token_ids")
"""What is sent to the processes only where a function names it."""
TRL = {"completions": "chat", "completion_ids": "token_ids"}
"""TRL's names of what answers are, and what has to be sent for them."""

TOLD = {kind: (*texts, "answer", "finished", "length", "max_new_tokens") for kind, texts in {
    "answer": ("prompt", "response"), "group": ("prompt", "responses"),
    "batch": ("prompts", "responses")}.items()}
"""What a function of each kind is always told, beside what the prompts say."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """How a reward function wants to be called: its parameters' names say it.

    Attributes:
        kind: "answer" (it is given one), "group" (those of one prompt) or "batch" (all that this
            process grades in a step).
        is_async: it is a coroutine function, of which many calls run at once.
        asked: of `ON_REQUEST` and `TRL`, the names that it has.
    """

    kind: str = "answer"
    is_async: bool = False
    asked: frozenset[str] = frozenset()

    @classmethod
    def of(cls, reward: Reward) -> "Signature":
        """The signature of a function or a callable object."""
        named = inspect.signature(reward).parameters.keys()
        kind = ("answer" if "response" in named or not PLURAL & named
                else "group" if "prompt" in named else "batch")
        is_async = any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__)))
        return cls(kind, is_async, frozenset(named & {*ON_REQUEST, *TRL}))

    @property
    def trl(self) -> frozenset[str]:
        """TRL's names, of those that it is given."""
        return self.asked & TRL.keys() if self.kind != "answer" else frozenset()

    @property
    def wants(self) -> frozenset[str]:
        """What of `RewardInput` has to be there for it."""
        return self.asked & set(ON_REQUEST) | {TRL[name] for name in self.trl}

    @property
    def names(self) -> tuple[str, ...]:
        """What it is always told, beside what the prompts say."""
        return (*TOLD[self.kind], *self.wants & set(ON_REQUEST), *self.trl)


def reasoning_gym(prompt: str, response: str, answer: str, *, task: str, options: dict, entry: dict,
                  **meta) -> float:
    """The verdict of the reasoning_gym task that the prompt is from; a response may put it in
    <answer></answer>."""
    return tasks.score(response, task, options, entry)


def soft_overlong(*, length: int, max_new_tokens: int, buffer: int | None = None,
                  **answer) -> float:
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13), in [-1, 0]: nothing up to
    `buffer` tokens before the cap, then falling linearly to -1 at it, the end token counted.

    Args:
        buffer: tokens, 1 to max_new_tokens; None: a fifth of the cap, DAPO's own share.

    Raises:
        ValueError: of another buffer.
    """
    buffer = max(1, max_new_tokens // 5) if buffer is None else buffer
    if not isinstance(buffer, int) or not 1 <= buffer <= max_new_tokens:
        raise ValueError(f"buffer must be a whole number from 1 to sampling.max_new_tokens="
                         f"{max_new_tokens}, not {buffer!r}")
    return max(-1.0, min(0.0, (max_new_tokens - buffer - length) / buffer))


SHIPPED: dict[str, Reward] = {"math_verify": math_verify, "reasoning_gym": reasoning_gym,
                              "soft_overlong": soft_overlong}


def check_reward(function: str | Mapping[str, Any], source: str | None = None,
                 max_new_tokens: int = MAX_NEW_TOKENS) -> None:
    """Refuses rewards that cannot work, before anything expensive is done.

    Args:
        function: as `reward.function` has it.
        source: the prompts' `data.source`, if it is to fit.
        max_new_tokens: the longest answer.

    Raises:
        InputError: a function is not there, does not import, is not callable, or does not take
            what it would be given; or it is reasoning_gym's and the prompts are not.
    """
    for part in reward_parts(function):
        if (part.function == "reasoning_gym" and source is not None
                and not source.startswith(tasks.PREFIX)):
            raise InputError(f"{part.key}=reasoning_gym grades only its own tasks, not "
                             f"data.source={source!r}; use math_verify or a function of yours")
        reward = load_reward(part.function, part.key)
        columns(part, reward)
        if part.function in SHIPPED:
            check_options(part, reward)
        if reward is soft_overlong:
            try:
                soft_overlong(length=0, max_new_tokens=max_new_tokens, **part.options)
            except ValueError as error:
                raise InputError(f"{part.label}: {error}") from None


def check_options(part: RewardPart, reward: Reward) -> None:
    """Raises InputError for an option that a shipped function does not have: it takes whatever it
    is told, so a misspelt one would do nothing."""
    told = Signature.of(reward).names
    known = [name for name, parameter in inspect.signature(reward).parameters.items()
             if parameter.default is not parameter.empty and name not in told]
    if unknown := part.options.keys() - set(known):
        raise InputError(f"{part.key}.options has {min(unknown)!r}, and {part.function} takes "
                         f"{', '.join(known) or 'no options'}")


def check_columns(function: str | Mapping[str, Any], source: str,
                  record: Mapping[str, Any]) -> None:
    """Raises InputError if a function demands by name what `record`, of the prompts of `source`
    (`SourcePart.label`), does not say."""
    for part in reward_parts(function):
        missing = columns(part, load_reward(part.function, part.key)) - record.keys()
        if missing:
            raise InputError(f"{part.label} takes {min(missing)!r}, which the prompts of "
                             f"{source} do not say: they have "
                             f"{', '.join(sorted(map(str, record)))}; give it as one of the "
                             "function's options, or a default")


def columns(part: RewardPart, reward: Reward) -> set[str]:
    """Arguments that a function demands beside what it is told of every answer and its options:
    the prompts have to say them.

    Raises InputError if the function does not take what it would be called with.
    """
    try:
        taken, signature = inspect.signature(reward), Signature.of(reward)
    except (TypeError, ValueError) as error:  # of a builtin that does not say
        raise InputError(f"{part.label}: {error}") from error
    try:
        told = dict.fromkeys(signature.names)
        if clash := told.keys() & part.options.keys():
            raise InputError(f"{part.key}.options: {min(clash)!r} is what a reward is told of "
                             "the answer; give the option another name")
        given = {**told, **part.options}
        demanded = {name for name, parameter in taken.parameters.items()
                    if parameter.default is parameter.empty and parameter.kind in (
                        parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)} - given.keys()
        taken.bind(**given, **dict.fromkeys(demanded), any_other_key=None)
    except TypeError as error:
        raise InputError(f"{part.label} must take ({', '.join(TOLD[signature.kind][:3])}, **meta) "
                         f"by name: {error}") from error
    return demanded


def answer_check(function: str | Mapping[str, Any], source: str) -> Callable[[str], None] | None:
    """What raises ValueError for an answer that these rewards cannot grade against; None where all
    will do, and for tasks, which make their own."""
    read = any(part.function == "math_verify" for part in reward_parts(function))
    return check_gold if read and not source.startswith(tasks.PREFIX) else None


def load_reward(function: str, key: str = "reward.function") -> Reward:
    """A reward function by its name.

    Raises:
        InputError, which begins with `key`: it is not there, does not import or is not callable.
    """
    if function == "reasoning_gym":
        tasks.import_gym()  # takes seconds, which no response shall pay for
    if function in SHIPPED:
        return SHIPPED[function]
    parts = user_code.split(function)
    if parts is None:
        raise InputError(f"{key}={function!r} is none of {', '.join(map(repr, SHIPPED))}, "
                         "'path/to/file.py:function'")
    reward = user_code.load(f"{key}={function!r}", function, "function", inspect.isfunction)
    if not callable(reward):
        raise InputError(f"{key}={function!r}: {parts[1]!r} is not a function, but "
                         f"{type(reward).__name__}")
    return reward


cached_reward = functools.cache(load_reward)
