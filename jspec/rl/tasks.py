"""Procedural tasks of reasoning-gym: their questions, and the verifiers that grade the answers.

Reward processes import this module, so it imports nothing heavy; reasoning-gym itself only when a task is asked for.
"""

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jspec.errors import InputError

PREFIX = "reasoning_gym:"
"""What `data.source` begins with when it names a task."""
DEFAULT_SIZE = 1024
"""Questions in one epoch of a task whose `size` is not given."""


class ReasoningGym(Sequence):
    """The questions of a task, each made when asked for, from the task's seed and the question's own number."""

    def __init__(self, task: str, options: Mapping[str, Any]):
        """
        Args:
            task: reasoning_gym's name of it, such as "chain_sum".
            options: arguments of the task, among them its `seed` and `size`.

        Raises:
            InputError: reasoning_gym is not installed, knows no such task, or the task refuses the options.
        """
        self.task, self.options = task, {"size": DEFAULT_SIZE} | dict(options)
        self.dataset = create(task, self.options)
        if len(self.dataset) < 1:
            raise InputError(f"data.options.size={self.options['size']!r} leaves {task!r} without questions")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        entry = self.dataset[number]
        answer = "" if entry["answer"] is None else str(entry["answer"])
        verdict = {"task": self.task, "options": self.options, "entry": entry}  # what `score` needs
        return {"prompt": entry["question"], "answer": answer} | verdict


def create(task: str, options: Mapping[str, Any]):
    """reasoning_gym's data set of a task; raises what `ReasoningGym` does."""
    gym = import_gym()
    if task not in gym.factory.DATASETS:
        close = difflib.get_close_matches(task, gym.factory.DATASETS, n=1)
        raise InputError(f"reasoning_gym has no task {task!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    try:
        return gym.create_dataset(task, **options)
    except Exception as error:  # every task checks its options in its own way: TypeError, AssertionError, ValueError
        raise InputError(f"the reasoning_gym task {task!r} refuses data.options={dict(options)}: {error}") from error


def import_gym():
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(f"reasoning_gym is not installed ({error}); run: pip install 'jspec[tasks]'") from error
    return reasoning_gym


def score(response: str, task: str, options: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    """The task's own verdict, in [0, 1], on what stands in the last <answer></answer>, or on the whole response."""
    tagged = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    answer = (tagged[-1] if tagged else response).strip()
    return verifier(task, json.dumps(options, sort_keys=True))(answer, entry)


@functools.lru_cache(maxsize=4)
def verifier(task: str, options: str):
    return create(task, json.loads(options)).score_answer
