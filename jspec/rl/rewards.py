"""Rewards: functions of a response's text, run in processes of their own that may hang or die
without harm.

The processes are spawned and import this module, so neither it nor what it imports may import jax:
that would cost each of them seconds and memory, and on some machines the accelerator.
"""

import dataclasses
import faulthandler
import functools
import inspect
import io
import logging
import multiprocessing
import numbers
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures import TimeoutError as Expired
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import pebble

from jspec import user_code
from jspec.errors import InputError
from jspec.rl import tasks
from jspec.rl.math_grading import check_gold, math_verify
from jspec.user_code import one_line

log = logging.getLogger(__name__)
LARGEST = float(np.finfo(np.float32).max)
ORPHAN_S = 5.0
"""Seconds past its time-out that a hung reward process may outlive a training process that was
killed."""

READY_S = 300.0
"""Seconds that the processes may take to import the function before the first of them begins to
grade."""

ATTEMPTS = 3
"""How often a response is handed to processes that die before they begin with it."""

Reward = Callable[..., float]
Grade = tuple[float, str | None, str]
"""(reward, kind of failure or None, message)"""
Task = tuple[pebble.ProcessPool, pebble.ProcessFuture | None]
"""A response handed to a pool; None if it took no more."""
FAILURES = ("raised", "timed_out", "invalid", "died")
"""Why a response scores 0 unjudged: the function raised, ran past the time-out, returned what is no
finite number, or its process ended."""


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
    """

    prompt: str
    response: str
    answer: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    finished: bool = True
    length: int = 0


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """Grades of N responses, in the order they were given in.

    Attributes:
        rewards: float32 [N], finite.
        failures: for each of `FAILURES`, how many of the N scored 0 for that reason.
        messages: for each kind of failure that happened, what the first of its kind said.
        by_name: float32 [N] of each reward function by itself, NaN where it does not apply.
    """

    rewards: np.ndarray
    failures: dict[str, int]
    messages: dict[str, str]
    by_name: dict[str, np.ndarray]


def reasoning_gym(prompt: str, response: str, answer: str, *, task: str, options: dict, entry: dict,
                  **meta) -> float:
    """The verdict of the reasoning_gym task that the prompt is from; a response may put it in
    <answer></answer>."""
    return tasks.score(response, task, options, entry)


def check_reward(function: str, source: str | None = None) -> None:
    """Refuses a reward that cannot work, before anything expensive is done.

    Args:
        function: "math_verify", "reasoning_gym", or "path/to/file.py:function".
        source: the prompts' `data.source`, if it is to fit.

    Raises:
        InputError: the function is not there, does not import, is not callable, or does not take
            (prompt, response, answer, **meta); or it is reasoning_gym's and the prompts are not.
    """
    if function == "reasoning_gym" and source is not None and not source.startswith(tasks.PREFIX):
        raise InputError(
            f"reward.function=reasoning_gym grades only its own tasks, not data.source={source!r}; "
            f"use math_verify or a function of yours"
        )
    load_reward(function)


def answer_check(function: str, source: str) -> Callable[[str], None] | None:
    """What raises ValueError for an answer that this reward cannot grade against; None where all
    will do, and for tasks, which make their own."""
    return check_gold if function == "math_verify" and not source.startswith(tasks.PREFIX) else None


def load_reward(function: str) -> Reward:
    """The function that `reward.function` names; raises as `check_reward` does."""
    if function == "math_verify":
        return math_verify
    if function == "reasoning_gym":
        tasks.import_gym()  # takes seconds, which no response shall pay for
        return reasoning_gym
    parts = user_code.split(function)
    if parts is None:
        raise InputError(
            f"reward.function={function!r} is none of 'math_verify', 'reasoning_gym', "
            "'path/to/file.py:function'"
        )
    reward = user_code.load(f"reward.function={function!r}", function, "function",
                            inspect.isfunction)
    if not callable(reward):
        raise InputError(f"reward.function={function!r}: {parts[1]!r} is not a function, but "
                         f"{type(reward).__name__}")
    try:
        inspect.signature(reward).bind(prompt="", response="", answer="", finished=True, length=0,
                                        any_other_key=None)
    except TypeError as error:
        raise InputError(
            f"reward.function={function!r} must take (prompt, response, answer, **meta) by name: "
            f"{error}"
        ) from error
    return reward


cached_reward = functools.cache(load_reward)
nowhere = functools.cache(functools.partial(open, os.devnull, "w"))


class Unheard(io.FileIO):
    """Where a reward function prints to: that nobody reads it, or the disk is full, is no
    response's fault."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def start_process(function: str) -> None:
    """Prepares a reward process: no accelerator for it, nothing that it prints can fail, and the
    function imported before the first response."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is not None:
            raw = Unheard(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), errors="backslashreplace",
                                                line_buffering=True))
    try:
        reward = cached_reward(function)
        if reward is math_verify:
            # imports sympy and builds the parsers: seconds, no response's
            math_verify("", "x", r"\sqrt{2}")
    except BaseException:  # noqa: B036
        return  # what is wrong will be said by the first response that is graded


def grade_one(function: str, item: RewardInput, timeout_s: float) -> Grade:
    """In a reward process."""
    # The pool kills what hangs. Should the pool itself be killed, the process must still not hang
    # for ever, and this is the one timer that works while C code holds the interpreter.
    faulthandler.dump_traceback_later(timeout_s + ORPHAN_S, exit=True, file=nowhere())
    try:
        value = cached_reward(function)(prompt=item.prompt, response=item.response,
                                        answer=item.answer,
                                        finished=item.finished, length=item.length, **item.meta)
        if isinstance(value, numbers.Real | np.bool_) and abs(float(value)) <= LARGEST:
            return float(value), None, ""
        return (0.0, "invalid",
                f"returned {type(value).__name__} {str(value)[:60]!r}, which is no finite float32")
    # SystemExit included: nothing that a reward does may stop the run
    except BaseException as error:  # noqa: B036
        return 0.0, "raised", one_line(error)
    finally:
        faulthandler.cancel_dump_traceback_later()


class RewardPool:
    """Grades responses in `workers` spawned processes, each response within `timeout_s` seconds.

        with RewardPool("math_verify", workers=2, timeout_s=10.0) as pool:
            result = pool.grade(items)                # waits
            pending = pool.submit(items)              # does not
            result = pending()

    A response whose grading raises, hangs, dies or returns no finite number scores 0, is counted,
    and stops nothing; the first of each kind is logged with what it said. What was waiting when a
    process died is graded by another. Check the function with `check_reward` beforehand.
    """

    def __init__(self, function: str, workers: int = 2, timeout_s: float = 10.0,
                 ready_s: float = READY_S) -> None:
        self.function, self.workers, self.timeout_s, self.ready_s = (function, workers, timeout_s,
                                                                     ready_s)
        self.logged: set[str] = set()
        self.pool = self.start()

    def living(self) -> pebble.ProcessPool:
        """A pool that takes work: pebble gives one up when a process of it dies between two
        tasks."""
        if not self.pool.active:
            self.close()
            self.pool = self.start()
        return self.pool

    def start(self) -> pebble.ProcessPool:
        pool = pebble.ProcessPool(
            max_workers=self.workers,
            initializer=start_process,
            initargs=(self.function,),
            context=multiprocessing.get_context("spawn"),
        )
        _ = pool.active  # to ask is to start the processes: they import while the model loads
        return pool

    def submit(self, items: Sequence[RewardInput]) -> Callable[[], RewardResult]:
        """Starts grading; the function returned waits for the grades and may be called once."""
        tasks = self.begin(items)
        return lambda: self.collect(items, tasks)

    def grade(self, items: Sequence[RewardInput]) -> RewardResult:
        """Grades of all items, in order."""
        return self.submit(items)()

    def begin(self, items: Sequence[RewardInput]) -> list[Task]:
        """Hands the items to the processes."""
        pool, timeout = self.living(), self.timeout_s
        tasks = []
        for item in items:
            try:
                tasks.append((pool, pool.schedule(grade_one, (self.function, item, timeout),
                                                  timeout=timeout)))
            except RuntimeError:  # it was given up this very moment
                tasks.append((pool, None))
        return tasks

    def collect(self, items: Sequence[RewardInput], tasks: Sequence[Task]) -> RewardResult:
        if not self.ready(tasks):
            self.close()
            self.pool = self.start()
            why = f"no process has begun: after {self.ready_s:g} s none had imported the function"
            return self.count([(0.0, "timed_out", why)] * len(items))
        grades = [self.wait(*task) for task in tasks]
        for _ in range(ATTEMPTS - 1):
            left = [index for index, grade in enumerate(grades) if grade is None]
            again = self.begin([items[index] for index in left]) if left else ()
            for index, task in zip(left, again, strict=True):
                grades[index] = self.wait(*task)
        return self.count([grade or (0.0, "died", "no process lived until it was its turn")
                           for grade in grades])

    def ready(self, tasks: Sequence[Task]) -> bool:
        """Waits until a process has begun with one of the tasks, from when pebble's own time-outs
        count; false if none has in time."""
        deadline = time.monotonic() + self.ready_s
        while (tasks and not any(future is None or future.running() or future.done()
                                 for _, future in tasks)):
            if not tasks[0][0].active:
                break
            if time.monotonic() > deadline:
                return False
            wait_for([future for _, future in tasks], timeout=0.1, return_when=FIRST_COMPLETED)
        return True

    def wait(self, pool: pebble.ProcessPool, future: pebble.ProcessFuture | None) -> Grade | None:
        """A grade, or None if no process began with it."""
        while future and not future.done() and pool.active:
            # a pool that is given up forgets what it had not yet sent
            wait_for([future], timeout=1.0)
        if not (future and future.done()):
            return None
        try:
            return future.result()
        except BrokenProcessPool:
            return None
        except Expired:
            return (0.0, "timed_out",
                    f"took longer than reward.timeout_s={self.timeout_s:g} seconds and was killed")
        except pebble.ProcessExpired as error:
            return 0.0, "died", f"its process ended with exit code {error.exitcode}"
        except Exception as error:  # no process could be sent the response
            return 0.0, "died", one_line(error)

    def count(self, grades: Sequence[Grade]) -> RewardResult:
        """The grades together. The first failure of each kind is logged."""
        counts = Counter(kind for _, kind, _ in grades if kind)
        messages = {kind: message for _, kind, message in reversed(grades) if kind}
        for kind in messages.keys() - self.logged:
            log.warning("reward %s scored a response 0 (%s): %s", self.function, kind,
                        messages[kind])
        self.logged |= messages.keys()
        rewards = np.asarray([reward for reward, _, _ in grades], dtype=np.float32)
        return RewardResult(rewards, {kind: counts[kind] for kind in FAILURES}, messages,
                            {self.function.rpartition(":")[2]: rewards})

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self.pool.stop()
        self.pool.join()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
