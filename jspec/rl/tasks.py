"""Procedural tasks of reasoning-gym: their questions, and the verifiers that grade the answers.

Reward processes import this module, so it imports nothing heavy; reasoning-gym itself only when a
task is asked for.
"""

import difflib
import functools
import hashlib
import importlib.util
import json
import pickle
import re
import subprocess
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from jspec.errors import InputError, shortened
from jspec.rl.processes import run_module

PREFIX = "reasoning_gym:"
"""What `data.source` begins with when it names a task."""
DEFAULT_SIZE = 1024
"""Questions in one epoch of a task whose `size` is not given."""
UNREPEATABLE = {"codeio": "its questions are outputs of programs that read the clock"}
"""Tasks whose questions are not decided by the seed, and why."""
MOST_QUESTIONS = 10**8
"""Of a task: the order of all of them is held in memory."""
REMEMBERED = 16
"""By how many questions a task's are known again."""


class ReasoningGym(Sequence):
    """The questions of a task, each made when asked for, from the task's seed and the question's
    own number.

    They are made by `jspec.rl.questions`, in a process of its own: there they are the same at every
    start. One thread at a time is answered.
    """

    at_once = 32  # some tasks search for a good question

    def __init__(self, task: str, options: Mapping[str, Any], further: int = 0) -> None:
        """
        Args:
            task: reasoning_gym's name of it, such as "chain_sum".
            options: arguments of the task, among them its `seed` and `size`.
            further: questions after those of `size`.

        Raises:
            InputError: reasoning_gym is not installed, knows no such task, the task refuses the
                options, or its questions are others at every start.
        """
        self.task, self.options = task, {"size": DEFAULT_SIZE} | dict(options)
        if further and isinstance(self.options["size"], int):
            self.options["size"] += further
        check_repeatable(task, self.options)
        for name in ("seed", "size"):  # what a task says of another type names neither
            if not isinstance(value := self.options.get(name, 0), int) or isinstance(value, bool):
                raise InputError(f"data.options.{name}={value!r} of {task!r} must be a whole "
                                 "number")
        if self.options["size"] > MOST_QUESTIONS:
            raise InputError(f"data.options.size={self.options['size']} of {task!r} must be at "
                             f"most {MOST_QUESTIONS}")
        if importlib.util.find_spec("reasoning_gym") is None:
            import_gym()
        self.lock = threading.Lock()
        self.start()
        # a step's are asked for again when it is saved
        self.entry = functools.lru_cache(maxsize=64)(self.make)
        if self.size < 1:
            raise InputError(f"data.options.size={self.options['size']!r} leaves {task!r} without "
                             "questions")

    def start(self) -> None:
        """Starts the process, which ends with its input."""
        self.process = run_module("jspec.rl.questions", PYTHONHASHSEED="0")
        weakref.finalize(self, stop, self.process)
        self.size = self.exchange((self.task, self.options))

    def exchange(self, request: Any) -> Any:
        """What the process answers. Raises InputError where it refuses, or has ended."""
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            made, answer = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.process.kill()
            made, answer = (False, "the process that makes its questions ended with exit code "
                            f"{self.process.wait()}")
        if not made:
            raise InputError(answer)
        return answer

    def make(self, number: int) -> dict[str, Any]:
        """A question as reasoning_gym has it. A process that has died is replaced."""
        with self.lock:
            if self.process.poll() is not None:
                self.start()
            try:
                return self.exchange(number)
            except InputError as error:
                raise InputError(f"{self.where(number)} cannot be made: {error}") from None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self.size:
            raise IndexError(number)
        entry = self.entry(number)
        answer = "" if entry["answer"] is None else str(entry["answer"])
        verdict = {"task": self.task, "options": self.options, "entry": entry}  # what `score` needs
        return {"prompt": entry["question"], "answer": answer} | verdict

    def where(self, number: int) -> str:
        return f"question {number} of {PREFIX}{self.task}"

    def digest(self, numbers: Any) -> str:
        """Of the last few of these questions: to make them all may take minutes."""
        last = [self[int(number)] for number in numbers[-REMEMBERED:]]
        return hashlib.sha256(json.dumps([[r["prompt"], r["answer"]] for r in last])
                              .encode()).hexdigest()[:16]


def stop(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def check_repeatable(task: str, options: Mapping[str, Any]) -> None:
    """Refuses a task whose questions the seed does not decide, or a part of `composite` of which
    that is so."""
    if task in UNREPEATABLE:
        raise InputError(f"the reasoning_gym task {task!r} asks other questions at every start: "
                         f"{UNREPEATABLE[task]}; "
                         "save some as a .jsonl file of {prompt, answer} and name that as "
                         "data.source")
    if options.get("seed", 0) is None:
        raise InputError(f"data.options: the seed of {task!r} is null, and it asks other questions "
                         "at every start; give a number, or leave it out for the run's own")
    for part in parts_of(task, options):
        check_repeatable(part["name"], part["config"])


def parts_of(task: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tasks that `composite` is made of, and none of any other: of each name, weight and
    config. Raises InputError for what describes none."""
    given = options.get("datasets", []) if task == "composite" else []
    parts = ([{"weight": 1.0, "config": {}} | part if isinstance(part, dict) else {}
              for part in given] if isinstance(given, list | tuple) else [{}])
    if any(part.keys() != {"name", "weight", "config"} or not isinstance(part["name"], str)
           or not isinstance(part["config"], dict) for part in parts):
        raise InputError(f"the reasoning_gym task {task!r} refuses "
                         f"data.options={shortened(str(options))}: datasets "
                         "must be a list of {name: a task, weight: 1, config: {...}}, the last two "
                         "as needed")
    if task in [part["name"] for part in parts]:
        raise InputError(f"data.options.datasets: {task!r} cannot be a part of itself; name its "
                         "parts one by one")
    return parts


def create(task: str, options: Mapping[str, Any]) -> Any:
    """reasoning_gym's data set of a task; raises what `ReasoningGym` does."""
    gym = import_gym()
    if task not in gym.factory.DATASETS:
        close = difflib.get_close_matches(task, gym.factory.DATASETS, n=1)
        raise InputError(f"reasoning_gym has no task {task!r}"
                         + (f"; did you mean {close[0]!r}?" if close else ""))
    parts = parts_of(task, options)
    try:
        # their own class
        own = {"datasets": [gym.composite.DatasetSpec(**part) for part in parts]} if parts else {}
        return gym.create_dataset(task, **{**options, **own})
    except Exception as error:
        # every task checks its options in its own way: TypeError, AssertionError, ValueError
        raise InputError(f"the reasoning_gym task {task!r} refuses data.options={dict(options)}: "
                         f"{error}") from error


def import_gym() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(f"reasoning_gym is not installed ({error}); run: pip install "
                         "'jspec[tasks]'") from error
    return reasoning_gym


def score(response: str, task: str, options: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    """The task's own verdict, in [0, 1], on what stands in the last <answer></answer>, or on the
    whole response."""
    tagged = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    answer = (tagged[-1] if tagged else response).strip()
    return verifier(task, json.dumps(options, sort_keys=True))(answer, entry)


@functools.lru_cache(maxsize=4)
def verifier(task: str, options: str) -> Callable[..., float]:
    return create(task, json.loads(options)).score_answer
