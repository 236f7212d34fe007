"""Rewards: functions of what the policy answered, run in processes of their own that may hang or
die without harm."""

import dataclasses
import logging
import math
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures import TimeoutError as Expired
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pebble

from jspec.choices import MAX_NEW_TOKENS
from jspec.config import Config
from jspec.errors import InputError
from jspec.reward_parts import RewardPart, reward_parts
from jspec.rl.reward_calls import FAILURES, LARGEST, Grade, calls_of, too_late
from jspec.rl.reward_calls import RewardInput as RewardInput
from jspec.rl.reward_functions import Signature, cached_reward
from jspec.rl.reward_functions import answer_check as answer_check
from jspec.rl.reward_functions import check_columns as check_columns
from jspec.rl.reward_functions import check_reward as check_reward
from jspec.rl.reward_functions import load_reward as load_reward
from jspec.rl.reward_functions import reasoning_gym as reasoning_gym
from jspec.rl.reward_processes import Job, read_journal, run, start_process
from jspec.user_code import one_line

log = logging.getLogger(__name__)
READY_S = 300.0
"""Seconds that the processes may take to import the functions before the first of them begins to
grade."""

ATTEMPTS = 3
"""How often a response is handed to processes that die before they begin with it."""

CONCURRENCY = 32
"""Async calls in flight, if nothing is said."""
Task = tuple[pebble.ProcessPool, pebble.ProcessFuture | None]
"""A job handed to a pool; None if it took no more."""


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """Grades of N responses, in the order they were given in.

    Attributes:
        rewards: float32 [N], finite: the weighted sum over the functions.
        failures: for each of `FAILURES`, how often a response scored 0 for that reason.
        messages: for each kind of failure that happened, what the first of its kind said.
        by_name: float32 [N] of each reward function by itself, NaN where it does not apply.
        failed: how many of the N a function with a weight could not grade. ungraded: how many of
            them none could. failed_rows: bool [N], which they are; None: none of them.
    """

    rewards: np.ndarray
    failures: dict[str, int]
    messages: dict[str, str]
    by_name: dict[str, np.ndarray]
    failed: int
    ungraded: int
    failed_rows: np.ndarray | None = None


class RewardPool:
    """Grades responses in `workers` spawned processes, each call of a function within `timeout_s`
    seconds.

        with RewardPool("math_verify", workers=2, timeout_s=10.0) as pool:
            result = pool.grade(items)                # waits
            pending = pool.submit(items)              # does not
            result = pending()

    A call that raises, hangs, dies or returns what is no finite number for each of its responses
    gives them 0, is counted, and stops nothing; the first of each kind is logged with what it said.
    What was waiting when a process died is graded by another. Check the function with
    `check_reward` beforehand.
    """

    def __init__(self, function: str | Mapping[str, Any], workers: int = 2, timeout_s: float = 10.0,
                 ready_s: float = READY_S, concurrency: int = CONCURRENCY,
                 max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        """
        Args:
            function: as `reward.function` has it: one, or several by name.
            ready_s: seconds that importing them may take.
            concurrency: calls of an async function in flight at once.
            max_new_tokens: the longest answer, which functions are told.
        """
        self.parts, self.workers, self.timeout_s = reward_parts(function), workers, timeout_s
        self.ready_s, self.concurrency, self.max_new_tokens = ready_s, concurrency, max_new_tokens
        self.signatures = [signature_of(part) for part in self.parts]
        self.logged: set[tuple[str, str]] = set()
        self.journals = journals(self.signatures)
        self.written = 0
        self.pool = self.start()

    @classmethod
    def of(cls, config: Config) -> "RewardPool":
        """The pool that a run's configuration asks for."""
        reward = config.reward
        return cls(reward.function, reward.workers, reward.timeout_s,
                   concurrency=reward.concurrency, max_new_tokens=config.sampling.max_new_tokens)

    @property
    def wants(self) -> frozenset[str]:
        """What the functions are to be given on request (`Signature.wants`)."""
        return frozenset().union(*(signature.wants for signature in self.signatures))

    @property
    def whole_groups(self) -> bool:
        """Whether a function compares the answers to one prompt, so that they have to be graded
        together."""
        return any(signature.kind != "answer" for signature in self.signatures)

    def living(self) -> pebble.ProcessPool:
        """A pool that takes work: pebble gives one up when a process of it dies between two
        tasks."""
        if not self.pool.active:
            self.stop()
            self.pool = self.start()
        return self.pool

    def start(self) -> pebble.ProcessPool:
        pool = pebble.ProcessPool(
            max_workers=self.workers,
            initializer=start_process,
            initargs=([part.function for part in self.parts],),
            context=multiprocessing.get_context("spawn"),
        )
        _ = pool.active  # to ask is to start the processes: they import while the model loads
        return pool

    def submit(self, items: Sequence[RewardInput]) -> Callable[[], RewardResult]:
        """Starts grading; the function returned waits for the grades and may be called once."""
        jobs = [self.jobs(part, signature, items)
                for part, signature in zip(self.parts, self.signatures, strict=True)]
        tasks = self.begin([job for of_part in jobs for job in of_part])
        return lambda: self.collect(len(items), jobs, tasks)

    def grade(self, items: Sequence[RewardInput]) -> RewardResult:
        """Grades of all items, in order."""
        return self.submit(items)()

    def jobs(self, part: RewardPart, signature: Signature,
             items: Sequence[RewardInput]) -> list[Job]:
        """What the processes have to do for one function: each call by itself, or all calls of an
        async one in one process, whose event loop they share."""
        calls = calls_of(part, signature, items, self.max_new_tokens)
        job = Job(part, signature, (), part.timeout_s or self.timeout_s, self.concurrency)
        shares = [calls] if signature.is_async and calls else [[call] for call in calls]
        return [self.fresh(job, share) for share in shares]

    def fresh(self, job: Job, calls: Sequence[Any], starts: int = 0) -> Job:
        """A job of these calls; an async one has a journal of its own."""
        self.written += 1
        journal = (Path(self.journals.name) / str(self.written)
                   if self.journals and job.signature.is_async else None)
        return dataclasses.replace(job, calls=calls, journal=journal, starts=starts)

    def begin(self, jobs: Sequence[Job]) -> list[Task]:
        """Hands jobs to the processes."""
        pool, tasks = self.living(), []
        for job in jobs:
            try:
                tasks.append((pool, pool.schedule(run, (job,), timeout=job.longest_s)))
            except RuntimeError:  # it was given up this very moment
                tasks.append((pool, None))
        return tasks

    def collect(self, count: int, jobs: Sequence[Sequence[Job]],
                tasks: Sequence[Task]) -> RewardResult:
        if not self.ready(tasks):
            self.stop()
            self.pool = self.start()
            why = f"no process has begun: after {self.ready_s:g} s none had imported the function"
            return self.count([[(0.0, "timed_out", why)] * count] * len(self.parts))
        grades: list[list[Grade]] = [[(math.nan, None, "")] * count for _ in self.parts]
        number = {part.name: place for place, part in enumerate(self.parts)}
        waiting = list(zip((job for of_part in jobs for job in of_part), tasks, strict=True))
        while waiting:
            again: list[Job] = []
            for job, task in waiting:
                given, left = self.wait(job, *task)
                again += left
                if job.journal:
                    job.journal.unlink(missing_ok=True)
                for call, of_call in zip(job.calls, given, strict=True):
                    for row, grade in zip(call.rows if of_call else (), of_call or (), strict=True):
                        grades[number[job.part.name]][row] = grade
            waiting = list(zip(again, self.begin(again) if again else (), strict=True))
        return self.count(grades)

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

    def wait(self, job: Job, pool: pebble.ProcessPool,
             future: pebble.ProcessFuture | None) -> tuple[list[list[Grade] | None], list[Job]]:
        """(grades of each of the job's calls, None of one that is to be made again, by the jobs
        that are to make them)."""
        while future and not future.done() and pool.active:
            # a pool that is given up forgets what it had not yet sent
            wait_for([future], timeout=1.0)
        begun = bool(future and future.done())
        try:
            if begun:
                return future.result(), []
            failure = "died", "no process lived until it was its turn"
        except BrokenProcessPool:
            begun, failure = False, ("died", "no process lived until it was its turn")
        except Expired:
            failure = too_late(job.part, job.timeout_s, 1)[0][1:]
        except pebble.ProcessExpired as error:
            failure = "died", f"its process ended with exit code {error.exitcode}"
        except Exception as error:  # no process could be sent the response
            failure = "died", one_line(error)
        return self.salvage(job, begun, failure)

    def salvage(self, job: Job, begun: bool,
                failure: tuple[str, str]) -> tuple[list[list[Grade] | None], list[Job]]:
        """What is left of a job whose process is gone, as `wait` has it. Of calls that shared the
        process, those that had ended keep their grades, each of those that it had begun is made
        again by itself, since nobody knows which of them ended it, and the others are once more
        made together."""
        lost = [[(0.0, *failure)] * len(call.rows) for call in job.calls]
        ended, open_calls = read_journal(job.journal) if job.journal else (
            {}, set(range(len(job.calls))) if begun else set())
        if ended or (open_calls and len(job.calls) > 1):
            alone = [self.fresh(job, [job.calls[number]]) for number in sorted(open_calls)]
            rest = [call for number, call in enumerate(job.calls)
                    if number not in ended and number not in open_calls]
            return ([ended.get(number) for number in range(len(job.calls))],
                    alone + ([self.fresh(job, rest)] if rest else []))
        if open_calls or job.starts + 1 >= ATTEMPTS:
            return lost, []
        return [None] * len(job.calls), [self.fresh(job, job.calls, job.starts + 1)]

    def count(self, grades: Sequence[Sequence[Grade]]) -> RewardResult:
        """The grades of each function together. The first failure of each kind is logged."""
        counts, messages, several = Counter(), {}, len(self.parts) > 1
        for part, of_part in zip(self.parts, grades, strict=True):
            counts.update(kind for _, kind, _ in of_part if kind)
            first = {kind: message for _, kind, message in reversed(of_part) if kind}
            for kind, message in first.items():
                messages.setdefault(kind, f"{part.name}: {message}" if several else message)
                if (part.name, kind) not in self.logged:
                    log.warning("reward %s scored a response 0 (%s): %s", part.function, kind,
                                message)
                self.logged.add((part.name, kind))
        columns = np.asarray([[reward for reward, _, _ in of_part] for of_part in grades])
        weights = np.asarray([part.weight for part in self.parts])
        total = weights @ np.nan_to_num(columns)
        lacking = np.asarray([[kind is not None for _, kind, _ in of_part] for of_part in grades],
                             dtype=bool)[weights != 0]
        lost = lacking | np.isnan(columns[weights != 0])  # it failed, or does not apply
        return RewardResult(
            np.clip(total, -LARGEST, LARGEST).astype(np.float32),
            {kind: counts[kind] for kind in FAILURES}, messages,
            {part.name: column.astype(np.float32)
             for part, column in zip(self.parts, columns, strict=True)},
            int(lacking.any(axis=0).sum()),
            int((lost.all(axis=0) & lacking.any(axis=0)).sum()),
            lacking.any(axis=0))

    def stop(self) -> None:
        """Ends the processes, whatever they are doing."""
        self.pool.stop()
        self.pool.join()

    def close(self) -> None:
        """Ends the processes, and forgets what they wrote down."""
        self.stop()
        if self.journals:
            self.journals.cleanup()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def journals(signatures: Sequence[Signature]) -> tempfile.TemporaryDirectory | None:
    """A folder for what async jobs write down; None where there are none, or there is no room."""
    if not any(signature.is_async for signature in signatures):
        return None
    with suppress(OSError):
        return tempfile.TemporaryDirectory(prefix="jspec-rewards-", ignore_cleanup_errors=True)
    return None


def signature_of(part: RewardPart) -> Signature:
    """How a part's function is to be called. What has become wrong with it since it was checked is
    said by the processes, of each response."""
    try:
        return Signature.of(cached_reward(part.function))
    except (InputError, TypeError, ValueError):
        return Signature()
