"""`jspec inspect`: a run's samples in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from rich.rule import Rule
from rich.text import Text

from jspec.arguments import path
from jspec.errors import InputError
from jspec.hub.names import located
from jspec.output import screen
from jspec.run_files import METRICS, Sample, read_samples, steps_with_samples


def inspect(arguments: argparse.Namespace) -> int:
    """`jspec inspect`: in a pager where there is a terminal, else as text."""
    run = whole_run(arguments.source)
    steps = chosen_steps(run, arguments.step)
    found = samples_of(run, steps, arguments)
    shown = list(islice(found, arguments.count))
    more = next(found, None) is not None
    if not shown:
        raise InputError(f"no sample of {run} is like that; it has those of {len(steps)} step(s), "
                         f"{steps[0]} to {steps[-1]}: ask for less")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    console = screen(width=None if sys.stdout.isatty() else 100)
    os.environ.setdefault("LESS", "-RX")  # so that it shows colors
    with console.pager(styles=True) if terminal else nullcontext():
        for sample in shown:
            console.print(Rule(headline(sample), align="left"))
            for part in ("prompt", "answer", "response"):
                console.print(part_of(sample, part), soft_wrap=not terminal)
        if more:
            console.print(f"\nThe first {len(shown)}; --count shows more.", style="dim")
    return 0


def whole_run(source: str) -> Path:
    """The output_dir that is read as a whole, whatever checkpoints it has. Raises InputError where
    one of them is named."""
    run, which = located(path("RUN", source))
    if which:
        raise InputError(f"RUN is {source}: what is shown is of the whole run and not of one "
                         f"checkpoint; leave out @{which}")
    return run


def chosen_steps(run: Path, wanted: tuple[int, int] | None) -> list[int]:
    """The steps with samples that lie in a range, bounds included, ascending. Raises InputError if
    there are none."""
    steps = steps_with_samples(run)
    if not steps and not (run / METRICS).exists():
        raise InputError(f"{run} is not the output_dir of a run: it has no {METRICS}")
    if not steps:
        raise InputError(f"{run} has no samples: logging.samples was 0, or its jspec an earlier "
                         "one")
    first, last = wanted or (steps[0], steps[-1])
    within = [step for step in steps if first <= step <= last]
    if not within:
        raise InputError(f"--step {first}{f'-{last}' if last != first else ''}: {run} has samples "
                         f"of {len(steps)} step(s), {steps[0]} to {steps[-1]}")
    return within


def samples_of(run: Path, steps: list[int], arguments: argparse.Namespace) -> Iterator[Sample]:
    """The samples that the arguments ask for, in their order; by step, those of a step are read
    when it is their turn."""
    forwards = arguments.sort == "step" and arguments.reverse
    found = (sample for step in (steps if forwards else reversed(steps))
             for sample in read_samples(run, step) if asked_for(sample, arguments))
    return found if arguments.sort == "step" else iter(sorted(
        found, key=lambda sample: sample.get(arguments.sort) or 0, reverse=arguments.reverse))


def asked_for(sample: Sample, arguments: argparse.Namespace) -> bool:
    reward = sample.get("reward", 0.0)
    return ((arguments.reward_below is None or reward < arguments.reward_below)
            and (arguments.reward_above is None or reward > arguments.reward_above)
            and (not arguments.failed or bool(sample.get("failed")))
            and arguments.source_name in (None, sample.get("source")))


def headline(sample: Sample) -> Text:
    """A sample in a line, the reward in the color of its sign."""
    reward = sample.get("reward", 0.0)
    color = "red" if sample.get("failed") or reward < 0 else "green" if reward > 0 else "yellow"
    by_name = rewards_by_name(sample)
    ended = "ended" if sample.get("finished") else "cut off"
    return Text.assemble(
        (f"step {sample['step']}", "bold"), f", sample {sample.get('sample')}",
        f" from {visible(str(sample['source']))}: " if sample.get("source") else ": ",
        (f"reward {reward:.4g}", color), f" ({by_name})" if by_name else "",
        (" not graded", "red") if sample.get("failed") else "",
        f", {sample.get('length')} tokens, {ended}, {sample.get('cycles')} cycles, "
        f"{sample.get('accepted')} accepted")


def rewards_by_name(sample: Sample) -> str:
    """The reward of each function in a line; "" where there is one alone."""
    rewards = sample.get("rewards") or {}
    return "" if len(rewards) < 2 else ", ".join(
        f"{visible(name)} {'-' if value is None else format(value, '.4g')}"
        for name, value in rewards.items())


def part_of(sample: Sample, part: str) -> Text:
    """A part of a sample, by its name."""
    return Text.assemble((f"{part}: ", "bold cyan"), visible(str(sample.get(part, ""))))


def visible(text: str) -> str:
    """A text in which nothing but line ends and tabs does anything to a terminal or a page."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
