"""What `jspec eval` does: answers to a task's prompts, graded, by `jspec.evaluator`."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import jspec
from jspec import user_code
from jspec.choices import MOST_SAMPLES
from jspec.distributed import is_main
from jspec.errors import InputError
from jspec.evaluator import Answered, Asked, answered, asked, drawn, eval_sampling, streams
from jspec.learning_sections import DataSection
from jspec.output import open_output, screen
from jspec.prepare import make_speculation
from jspec.progress import say, telling
from jspec.reward_parts import reward_parts
from jspec.rl.prompts import PromptData
from jspec.rl.rewards import RewardPool
from jspec.rl.scores import interval
from jspec.run_dir import data_position, run_plan
from jspec.session import Session, session
from jspec.settings import Override
from jspec.source_parts import in_short, source_parts
from jspec.sources import Source, mesh_of, open_source, overridden

UNUSED = {"steps", "output_dir", "log_level", "draft", "grpo", "checkpoint", "profile"}
"""Sections and keys of a config that an evaluation does not look at (but draft.name=none does go
without a run's)."""
FLAGS = ("prompts", "samples", "batch", "temperature")
"""Options that say what a key of the section `evaluation` says too."""
NO_TRAINING: tuple[Override, ...] = (("evaluation.every", 0), ("checkpoint.best", None))
"""What is asked of a config's other keys by these is nothing to who only evaluates."""


def evaluate(arguments) -> int:
    """`jspec eval`: samples answers to a task's prompts, grades them, and reports their scores."""
    for name in ("prompts", "samples", "batch"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if (arguments.samples or 0) > MOST_SAMPLES:
        raise InputError(f"--samples must be at most {MOST_SAMPLES}, not {arguments.samples}")
    flags = [(f"evaluation.{name}", value) for name in FLAGS
             if (value := getattr(arguments, name)) is not None]
    with session() as opened:
        return _evaluate(arguments, [*arguments.overrides, *flags, *NO_TRAINING], opened)


def _evaluate(arguments: argparse.Namespace, overrides: list[Override], opened: Session) -> int:
    """`evaluate`, once the session is open."""
    written = open_output(None if arguments.json == "-" else arguments.json, "--json")
    source = open_source(arguments.source, overrides, run_code=arguments.run_code)
    mesh, layout = mesh_of(source)
    opened.use(mesh)
    check_code(source, arguments.overrides, arguments.run_code)
    if source.draft is not None:
        source.draft.check_finite(source.name)
    check_kept(source)
    say_unused(arguments.overrides)
    prompts = {label: drawn(source.config, data, "--prompts " if arguments.prompts else
                            "evaluation.prompts=") for label, data in prompts_of(source).items()}
    speculation = speculation_of(source)
    ask = asked(source.config, prompts, source.shape, source.draft, speculation, layout)
    with telling(f"loading {arguments.source}"):
        policy = jspec.reshard(source.load_finite(), layout)
    console = screen(stderr=arguments.json == "-")
    answers, seconds = take(source, policy, ask, speculation, console)
    result = {"source": arguments.source, "overrides": arguments.overrides,
              **summary(source, answers, seconds)}
    console.print("scores: mean over prompts [95% interval: percentile bootstrap over prompts]; an "
                  "answer is right whose reward is at least "
                  f"{source.config.evaluation.right_from:g}", soft_wrap=True, markup=False)
    console.print(score_table(result["scores"]))
    console.print(summary_table(result))
    if is_main() and written:
        written.write(json.dumps(result, indent=2) + "\n")
    elif is_main() and arguments.json == "-":
        print(json.dumps(result))
    return 0


def check_code(source: Source, overrides: list[str], allowed: bool) -> None:
    """A folder that is opened for its weights runs no code: raise InputError if a run's own config
    names a file as its reward, unless that is allowed or the command line names one itself."""
    files = [part.function for part in reward_parts(source.config.reward.function)
             if user_code.split(part.function)]
    if not files:
        return
    named, own = overridden("reward.function", overrides), source.own
    theirs = {part.function for part in reward_parts(own.reward.function)} if own else set()
    if (run := sorted(theirs & set(files))) and not (allowed or named):
        raise InputError(f"the config of {source.name} has its answers graded by {run[0]}, which "
                         "would run that file: look at it, then give --run-code, or name "
                         "a function with reward.function=...")
    say(f"grading with {', '.join(files)}")


def check_kept(source: Source) -> None:
    """Raise InputError if the data of a run that kept prompts are no longer those that it was
    trained on: others would be held out now, and what it was trained on among them."""
    own = source.own
    data, named = source.config.data, source.config.evaluation.sources
    if own is None or not own.data.held_out or not data.held_out or named or (
            not same_prompts(data, own.data)):
        return
    training = PromptData(own.data, source.tokenizer, seed=own.seed)
    try:
        training.restore(data_position(Path(source.name).expanduser()))
    except InputError:
        raise InputError(f"{in_short(own.data.source)} is no longer what {source.name} was trained "
                         "on, so the prompts that it kept are not known any more; put it back as "
                         "it was, or evaluate on a file of prompts that training never saw "
                         "(data.source=..., data.held_out=0)") from None


def same_prompts(data: DataSection, own: DataSection) -> bool:
    """Whether all of these are of sources that those are of."""
    ours, theirs = ([(part.source, part.data.split) for part in source_parts(section)]
                    for section in (data, own))
    return all(source in theirs for source in ours)


def prompts_of(source: Source) -> dict[str, PromptData]:
    """`evaluator.streams`: of a run those that it kept from training, else its training's, which is
    said."""
    config, own = source.config, source.own
    data = config.data
    if own is not None and same_prompts(data, own.data) and not config.evaluation.sources:
        told = {part.source: part.data.options for part in source_parts(own.data)}
        options = {part.source: part.data.options for part in source_parts(data)}
        if data.held_out and ((data.held_out, config.seed) != (own.data.held_out, own.seed)
                              or options != {source: told[source] for source in options}):
            options = "".join(f", of data.options={said}," for said in told.values() if said)
            raise InputError(f"{source.name} kept data.held_out={own.data.held_out} prompts by "
                             f"seed={own.seed}{options} from its training, and others were trained "
                             "on; leave that as it is")
        if not data.held_out:
            say(f"{source.name} kept no prompts from training (data.held_out=0): these are its "
                "training's")
    return streams(config, source.tokenizer)


def say_unused(overrides: Sequence[str]) -> None:
    """Says which overrides change nothing: an evaluation neither trains nor makes a draft. (Those
    of a config's file are its training's.)"""
    keys = [text.partition("=")[0].strip() for text in overrides
            if text.replace(" ", "") != "draft.name=none"]
    if unused := [key for key in keys if key.partition(".")[0] in UNUSED]:
        say(f"{', '.join(unused)}: no part of an evaluation, and left aside")


def speculation_of(source: Source) -> jspec.Speculation:
    """How answers are drafted; where speculation.k is auto, as a run did at last, and nothing where
    that is not known. Raises InputError for a run whose checkpoint cannot be read."""
    auto = source.draft is not None and source.config.speculation.k == "auto"
    return make_speculation(source.config,
                            (auto and run_plan(Path(source.name).expanduser()).k) or 0)


def take(source: Source, policy: jspec.Policy, ask: Asked, speculation: jspec.Speculation,
         console: Console) -> tuple[Answered, float]:
    """(the answers and their grades, the seconds of it all). `policy` is in the rollout layout."""
    done, start = 0, time.perf_counter()
    with (RewardPool.of(source.config) as pool,
          telling("answering (the first batch compiles)", total=len(ask.prompts)) as advance):

        def told(part: Answered) -> None:
            nonlocal done
            advance(len(part.rewards) - done)
            done = len(part.rewards)
            console.print(f"{done:>5} prompts, mean reward {part.rewards.mean():.3f}")

        answers = answered(source.config, source.tokenizer, pool, policy, source.draft, ask,
                           speculation, told)
    return answers, time.perf_counter() - start


def summary(source: Source, answers: Answered, seconds: float) -> dict[str, Any]:
    """What is written as JSON; of every score its mean and the bounds of `scores.interval`."""
    config, rewards = source.config, answers.rewards
    by_prompt, count = rewards.mean(axis=1), len(rewards)
    tables = {label or "all": {name: [float(values.mean()), *interval(values)]
                               for name, values in table.items()}
              for label, table in answers.by_source(config).items()}
    return {
        "prompts": count, "samples": rewards.shape[1],
        "temperature": float(eval_sampling(config).temperature),
        "held_out": bool(config.data.held_out) and not config.evaluation.sources,
        "mean_reward": float(rewards.mean()),
        **{f"mean_reward/{name}": mean for name, mean in answers.by_function().items()},
        "standard_error": float(by_prompt.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0,
        "mean_of_the_best_sample": float(rewards.max(axis=1).mean()),
        "mean_tokens": float(answers.lengths.mean()),
        "share_finished": float(answers.finished.mean()),
        "graded_0_by_failure": answers.failures, "scores": tables,
        "seconds_compiling_included": round(seconds, 3),
    }


def score_table(scores: dict[str, dict[str, list[float]]]) -> Table:
    """Scores by source, each with its interval."""
    shown = Table(show_edge=False)
    shown.add_column("")
    for label in scores:
        shown.add_column(label, justify="right")
    for name in next(iter(scores.values())):
        cells = (scores[label][name] for label in scores)
        shown.add_row(name, *(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in cells))
    return shown


def summary_table(result: dict[str, Any]) -> Table:
    """All other numbers."""
    shown = Table(show_edge=False, show_header=False)
    for key, value in result.items():
        if isinstance(value, int | float):
            shown.add_row(key.replace("_", " "),
                          f"{value:.4g}" if isinstance(value, float) else str(value))
    return shown
