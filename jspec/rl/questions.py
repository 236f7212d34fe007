"""Makes the questions of a reasoning_gym task, in a process in which nothing but seed and number
decides them.

`python -m jspec.rl.questions` reads (task, options), then numbers, from standard input, and writes
what became of each, all as pickles. Several tasks iterate over sets, whose order follows Python's
hash seed, and some draw from the global generators: so `jspec.rl.tasks` starts this process with
one and the same hash seed, and the generators are seeded here for every question anew.
"""

import os
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from jspec.errors import InputError
from jspec.rl.tasks import create


def main() -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # tasks print
    task, options = pickle.load(requests)
    dataset: Any = None

    def send(make: Callable[[], Any], *seed: Any) -> None:
        replies.write(outcome(make, options["seed"], *seed))
        replies.flush()

    def begin() -> int:
        nonlocal dataset
        dataset = create(task, options)
        return len(dataset)

    send(begin)
    while True:
        try:
            number = pickle.load(requests)
        except EOFError:
            return
        send(lambda number=number: dataset[number], number)


def outcome(make: Callable[[], Any], *seed: Any) -> bytes:
    """(True, what is made) with Python's and NumPy's own generators seeded, or (False, why it
    cannot be), pickled."""
    random.seed(repr(seed))
    np.random.seed(random.getrandbits(32))
    try:
        return pickle.dumps((True, make()))
    except InputError as error:
        return pickle.dumps((False, str(error)))
    except Exception as error:  # a task may raise anything
        return pickle.dumps((False, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
