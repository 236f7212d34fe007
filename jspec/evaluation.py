"""What `jspec eval` does: answers to a task's prompts, graded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jspec
from jspec import user_code
from jspec.answering import batch_on_mesh, decoded
from jspec.choices import MOST_SAMPLES
from jspec.distributed import is_main
from jspec.errors import InputError
from jspec.model import Policy
from jspec.output import open_output, screen
from jspec.prepare import make_batching, make_sampling, make_speculation
from jspec.progress import say, telling
from jspec.purposes import EVAL_KEY, purpose_key, purpose_seed
from jspec.reward_parts import reward_parts
from jspec.rl.answers import reward_inputs
from jspec.rl.prompts import Prompt, PromptData
from jspec.rl.rewards import RewardPool, answer_check, check_columns, check_reward
from jspec.run_dir import data_position, run_plan
from jspec.session import Session, session
from jspec.settings import Override
from jspec.sharding import batch_shards
from jspec.sources import Source, mesh_of, open_source, overridden
from jspec.speculate.arguments import check, check_batching

PROMPTS = 64
"""How many prompts, if nothing is said and the data has as many."""
UNUSED = {"steps", "output_dir", "log_level", "draft", "grpo", "checkpoint", "profile"}
"""Sections and keys of a config that an evaluation does not look at (but draft.name=none does go
without a run's)."""


def evaluate(arguments) -> int:
    """`jspec eval`: samples answers to a task's prompts, grades them, and reports the mean
    reward."""
    for name in ("prompts", "samples", "batch"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if arguments.samples > MOST_SAMPLES:
        raise InputError(f"--samples must be at most {MOST_SAMPLES}, not {arguments.samples}")
    overrides: list[Override] = list(arguments.overrides)
    if arguments.temperature is not None:
        overrides.append(("sampling.temperature", arguments.temperature))
    with session() as opened:
        return _evaluate(arguments, overrides, opened)


def _evaluate(arguments: argparse.Namespace, overrides: list[Override], opened: Session) -> int:
    """`evaluate`, once the session is open."""
    written = open_output(None if arguments.json == "-" else arguments.json, "--json")
    source = open_source(arguments.source, overrides, run_code=arguments.run_code)
    mesh, layout = mesh_of(source)
    opened.use(mesh)
    check_code(source, arguments.overrides, arguments.run_code)
    check_reward(source.config.reward.function, source.config.data.source,
                 source.config.sampling.max_new_tokens)
    if source.draft is not None:
        source.draft.check_finite(source.name)
    check_kept(source)
    say_unused(arguments.overrides)
    data = prompts_of(source)
    check_columns(source.config.reward.function, source.config.data.source, data.records[0])
    count = check_count(source, data, arguments.prompts)
    speculation = speculation_of(source)
    batches = batches_of(source, data, count, arguments.samples, min(arguments.batch, count),
                         speculation, layout)
    with telling(f"loading {arguments.source}"):
        policy = jspec.reshard(source.load_finite(), layout)
    console = screen(stderr=arguments.json == "-")
    result = {"source": arguments.source, "overrides": arguments.overrides,
              **score(source, policy, batches, count, speculation, console)}
    table = Table(show_edge=False, show_header=False)
    for key, value in result.items():
        if isinstance(value, int | float):
            table.add_row(key.replace("_", " "),
                          f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
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
    if own is None or not own.data.held_out or not source.config.data.held_out or (
            source.config.data.source != own.data.source):
        return
    training = PromptData(own.data, source.tokenizer, seed=own.seed)
    try:
        training.restore(data_position(Path(source.name).expanduser()))
    except InputError:
        raise InputError(f"{own.data.source} is no longer what {source.name} was trained on, so "
                         "the prompts that it kept are not known any more; put it back as it was, "
                         "or evaluate on a file of prompts that training never saw "
                         "(data.source=..., data.held_out=0)") from None


def prompts_of(source: Source) -> PromptData:
    """The prompts to answer, one a step: those that the run kept from training, else its own, in an
    order of their own (of procedural tasks: other questions), which is said of a run."""
    config, own = source.config, source.own
    section = dataclasses.replace(config.data, prompts_per_step=1)
    held_out = bool(section.held_out)
    if own is not None and section.source == own.data.source:
        chosen = [(c.data.held_out, c.seed, c.data.options) for c in (config, own)]
        if held_out and chosen[0] != chosen[1]:
            options = f", of data.options={own.data.options}," if own.data.options else ""
            raise InputError(f"{source.name} kept data.held_out={own.data.held_out} prompts by "
                             f"seed={own.seed}{options} from its training, and others were trained "
                             "on; leave that as it is")
        if not held_out:
            say(f"{source.name} kept no prompts from training (data.held_out=0): these are its "
                "training's")
    seed = config.seed if held_out else purpose_seed(config.seed, EVAL_KEY)
    return PromptData(section, source.tokenizer, seed=seed, held_out=held_out,
                      check_answer=answer_check(config.reward.function, section.source))


def check_count(source: Source, data: PromptData, wanted: int | None) -> int:
    """How many prompts to answer. Raises InputError for more than there are."""
    available = len(data.records)
    if wanted is not None and wanted > available:
        held_out = " held out (data.held_out)" if source.config.data.held_out else ""
        raise InputError(f"--prompts {wanted} is more than {source.config.data.source} "
                         f"has{held_out}: {available}")
    return min(PROMPTS, available) if wanted is None else wanted


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


def batches_of(source: Source, data: PromptData, count: int, samples: int, batch: int,
               speculation: jspec.Speculation,
               layout: str) -> list[tuple[list[Prompt], jspec.PromptBatch]]:
    """The prompts to answer, `batch` at a time; the last batch is filled up with prompts that are
    not asked for, and each with as many as the mesh needs to split its rows.

    Raises InputError for what a rollout of them would refuse, so that it is said before any weights
    are read.
    """
    config, key = source.config, purpose_key(source.config.seed, EVAL_KEY)
    steps = [[prompt for _ in range(batch) for prompt in next(data)]
             for _ in range(math.ceil(count / batch))]
    made = [batch_on_mesh([prompt.tokens for prompt in chosen], layout, group_size=samples,
                          seed=jax.random.fold_in(key, step)) for step, chosen in enumerate(steps)]
    sampling, batching = make_sampling(config), make_batching(config)
    for prompts in made:  # `check` would not name the setting
        rows, length = len(prompts.sequence_ids), prompts.tokens.shape[1]
        check_batching("rollout.", batching, batch_shards(layout), rows, samples, length,
                       sampling.max_new_tokens, 0 if source.draft is None else speculation.most)
        check(source.shape, source.draft, prompts, sampling, speculation, batching)
    return list(zip(steps, made, strict=True))


def score(source: Source, policy: Policy, batches: Sequence[tuple[list[Prompt], jspec.PromptBatch]],
          prompts: int, speculation: jspec.Speculation, console: Console) -> dict[str, Any]:
    """Mean reward of the answers to the first `prompts` prompts of `batches`, with its standard
    error over prompts. `policy` is in the rollout layout."""
    config, (batch, samples) = source.config, (len(batches[0][0]), batches[0][1].group_size)
    sampling, batching = make_sampling(config), make_batching(config)
    rewards, lengths, finished, failures, seconds = [], [], [], 0, 0.0
    by_name: dict[str, list] = {part.name: [] for part in reward_parts(config.reward.function)}
    with (RewardPool.of(config) as pool,
          telling("answering (the first batch compiles)", total=prompts) as advance):
        for step, (chosen, made) in enumerate(batches):
            start = time.perf_counter()
            out = decoded(policy, source.draft, made, batch * samples, sampling=sampling,
                          speculation=speculation, batching=batching)
            seconds += time.perf_counter() - start
            graded = pool.grade(reward_inputs(source.tokenizer, chosen, out, wants=pool.wants))
            keep = min(batch, prompts - step * batch)
            rewards.append(graded.rewards.reshape(batch, samples)[:keep])
            lengths.append(out.lengths.reshape(batch, samples)[:keep])
            finished.append(out.finished.reshape(batch, samples)[:keep])
            for name, values in graded.by_name.items():
                by_name[name].append(values[:keep * samples])
            failures += graded.failed
            advance(keep)
            console.print(f"{min(prompts, (step + 1) * batch):>5} prompts, mean reward "
                          f"{np.concatenate(rewards).mean():.3f}")
    grades = np.concatenate(rewards)
    by_prompt = grades.mean(axis=1)
    return {
        "prompts": prompts, "samples": samples, "temperature": config.sampling.temperature,
        "held_out": bool(config.data.held_out),
        "mean_reward": float(grades.mean()),
        **(means_by_name(by_name) if len(by_name) > 1 else {}),
        "standard_error": float(by_prompt.std(ddof=1) / math.sqrt(prompts)) if prompts > 1 else 0.0,
        "mean_of_the_best_sample": float(grades.max(axis=1).mean()),
        "mean_tokens": float(np.concatenate(lengths).mean()),
        "share_finished": float(np.concatenate(finished).mean()),
        "graded_0_by_failure": int(failures),
        "seconds_of_rollouts_compiling_included": round(seconds, 3),
    }


def means_by_name(by_name: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float | None]:
    """The mean of each reward function over the answers that it applies to, None where those are
    none."""
    applied = {name: values[~np.isnan(values)]
               for name, values in ((name, np.concatenate(of)) for name, of in by_name.items())}
    return {f"mean_reward/{name}": float(values.mean()) if values.size else None
            for name, values in applied.items()}
