"""What reward processes do: call reward functions, one at a time, or many async ones at once.

The processes are spawned and import this module, so neither it nor what it imports may import jax:
that would cost each of them seconds and memory, and on some machines the accelerator.
"""

import asyncio
import dataclasses
import faulthandler
import functools
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from jspec.reward_parts import RewardPart
from jspec.rl.math_grading import math_verify
from jspec.rl.reward_calls import Call, Grade, failed, grades_of, too_late
from jspec.rl.reward_functions import Signature, cached_reward

ORPHAN_S = 5.0
"""Seconds past its time-out that a hung reward process may outlive a training process that was
killed."""

GRACE_S = 1.0
"""Seconds past its time-out that an async call has to be cancelled in, before its process is
killed."""

nowhere = functools.cache(functools.partial(open, os.devnull, "w"))
event_loop = functools.cache(asyncio.new_event_loop)
"""One for the life of a process, so that a client that a function keeps open stays of use."""


class Unheard(io.FileIO):
    """Where a reward function prints to: that nobody reads it, or the disk is full, is no
    response's fault."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def start_process(functions: Sequence[str]) -> None:
    """Prepares a reward process: no accelerator for it, nothing that it prints can fail, and the
    functions imported before the first response."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is not None:
            raw = Unheard(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), errors="backslashreplace",
                                                line_buffering=True))
    for function in functions:
        try:
            if cached_reward(function) is math_verify:
                # imports sympy and builds the parsers: seconds, no response's
                math_verify("", "x", r"\sqrt{2}")
        except BaseException:  # noqa: B036
            pass  # what is wrong will be said by the first response that is graded


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process does at a time: one call of a function, or many of one that is async.

    Attributes:
        part: whose function it is. signature: how that is called.
        calls: what it is called with.
        timeout_s: seconds of one call.
        concurrency: async calls in flight at most.
        journal: where an async job writes down which calls it has begun and what they gave; only
            its own, for what outlives a process that ends.
        starts: how often it was handed to processes that ended before they began with it.
    """

    part: RewardPart
    signature: Signature
    calls: Sequence[Call]
    timeout_s: float
    concurrency: int
    journal: Path | None = None
    starts: int = 0

    @property
    def longest_s(self) -> float:
        """Seconds after which its process is killed."""
        if not self.signature.is_async:
            return self.timeout_s
        return -(-len(self.calls) // self.concurrency) * (self.timeout_s + GRACE_S)


def run(job: Job) -> list[list[Grade]]:
    """The grades of each call. In a reward process."""
    # The pool kills what hangs. Should the pool itself be killed, the process must still not hang
    # for ever, and this is the one timer that works while C code holds the interpreter.
    faulthandler.dump_traceback_later(job.longest_s + ORPHAN_S, exit=True, file=nowhere())
    try:
        return run_async(job) if job.signature.is_async else [run_call(job)]
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_call(job: Job) -> list[Grade]:
    """The grades of a job's one call."""
    (call,) = job.calls
    try:
        returned = cached_reward(job.part.function)(**call.arguments)
        return grades_of(job.signature, returned, len(call.rows))
    # SystemExit included: nothing that a reward does may stop the run
    except BaseException as error:  # noqa: B036
        return failed(error, len(call.rows))


def run_async(job: Job) -> list[list[Grade]]:
    """The grades of each call, `concurrency` of them at a time."""
    try:
        return event_loop().run_until_complete(all_calls(job))
    except BaseException:  # noqa: B036 - SystemExit of a task that a call has started itself
        die()


def die() -> NoReturn:
    """Ends the process: what it leaves undone is done by another, each call by itself."""
    os._exit(1)


async def all_calls(job: Job) -> list[list[Grade]]:
    gate, journal = asyncio.Semaphore(job.concurrency), Journal(job.journal)

    async def one(number: int, call: Call) -> list[Grade]:
        async with gate:
            journal.write(number)
            task = asyncio.ensure_future(async_call(job, call))
            done, _ = await asyncio.wait({task}, timeout=job.timeout_s)
            task.cancel()  # and not waited for: it may refuse
            grades = task.result() if done else too_late(job.part, job.timeout_s, len(call.rows))
            journal.write(number, grades)
            return grades

    pulse = asyncio.ensure_future(beat(job))
    try:
        return await asyncio.gather(*(one(*pair) for pair in enumerate(job.calls)))
    finally:
        pulse.cancel()


async def async_call(job: Job, call: Call) -> list[Grade]:
    try:
        returned = await cached_reward(job.part.function)(**call.arguments)
        return grades_of(job.signature, returned, len(call.rows))
    except BaseException as error:  # noqa: B036
        return failed(error, len(call.rows))


async def beat(job: Job) -> None:
    """Ends the process once a call does not let go of the event loop for longer than it may, which
    holds up all others; of a job of one call the pool does it, and says so."""
    every = min(1.0, job.timeout_s / 4)
    while len(job.calls) > 1:
        faulthandler.dump_traceback_later(job.timeout_s + every, exit=True, file=nowhere())
        await asyncio.sleep(every)


class Journal:
    """What has become of a job's calls, line by line: a call's number when it begins, and again
    with its grades when it ends."""

    def __init__(self, path: Path | None) -> None:
        self.file = None
        with suppress(OSError):
            self.file = open(path, "ab", buffering=0) if path else None

    def write(self, number: int, grades: Sequence[Grade] | None = None) -> None:
        with suppress(OSError):  # on a full disk more is done again, and nothing lost
            if self.file is not None:
                self.file.write(f"{json.dumps([number, grades])}\n".encode())


def read_journal(path: Path) -> tuple[dict[int, list[Grade]], set[int]]:
    """(grades of the calls that ended, numbers of those that only began) of a job whose process
    is gone."""
    ended, begun = {}, set()
    with suppress(OSError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            number, grades = json.loads(line)
            begun.add(number)
            if grades is not None:
                ended[number] = [(reward, kind, message) for reward, kind, message in grades]
    return ended, begun - ended.keys()
