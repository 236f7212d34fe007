"""Whether small runs of this checkout have the metrics of another commit's, to the last digit.

    python -m benchmarks.same main
    python -m benchmarks.same COMMIT --only tiny

A change that is not meant to change what is computed passes this: same tokens, same losses, same
gradients. Three steps of configs/tiny.yaml are run in both, with several drafters and rules, on the
CPU; what depends on the clock is left out. Exit code 1, and the first difference of each run, where
they differ. About half a minute a run and checkout on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from benchmarks.options import program
from jspec.errors import InputError

RUNS = {
    "tiny": (),
    "suffix": ("draft.name=suffix", "grpo.updates_per_rollout=2"),
    "rollout": ("draft.features=rollout", "speculation.rule=coupled", "rollout.slots=8"),
    "eagle3": ("draft.name=eagle3", "speculation.rule=block", "grpo.micro_batch=8"),
}
CLOCK = ("time", "seconds", "tokens_per_second", "compilations")
"""Metrics, or what they begin with before a slash, that two runs of the same code differ in."""

Records = list[dict[str, Any]]


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A checkout of a commit, for as long as it is needed. Raises InputError if git has none."""
    with tempfile.TemporaryDirectory(prefix="jspec-same-") as folder:
        path = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit],
                              capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"no checkout of {commit}: {done.stderr.strip().splitlines()[-1]}")
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def metrics(place: Path, overrides: tuple[str, ...]) -> Records:
    """What a run in a checkout records of its steps, without what depends on the clock.

    Raises InputError, with its last words, if it does not end well."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(place)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jspec", "train", "configs/tiny.yaml", "steps=3",
                   f"output_dir={folder}/run", "checkpoint.every=100", *overrides]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{place}: {' '.join(command[1:])} ended with exit code "
                             f"{done.returncode}: {done.stderr[-500:]}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items()
             if key.split("/")[0] not in CLOCK} for line in lines]


def difference(ours: Records, theirs: Records) -> str:
    """The first metric that differs, in words, of those that both have before those that only one
    has; "" if none does."""
    steps = list(zip(ours, theirs, strict=True))
    both = [(key, mine, other) for mine, other in steps
            for key in sorted(mine.keys() & other.keys())]
    one = [(key, mine, other) for mine, other in steps
           for key in sorted(mine.keys() ^ other.keys())]
    for key, mine, other in [*both, *one]:
        if mine.get(key) != other.get(key):
            return f"step {mine['step']}: {key} is {mine.get(key)}, was {other.get(key)}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with: whatever git takes for a commit")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    args = parser.parse_args(arguments)
    failed = 0
    with checkout(args.commit) as place:
        for name in args.only:
            found = difference(metrics(ROOT, RUNS[name]), metrics(place, RUNS[name]))
            print(f"{name}: {found or 'the same'}", flush=True)
            failed += bool(found)
    return int(failed > 0)


if __name__ == "__main__":
    program(main)
