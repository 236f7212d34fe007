"""Which loss trains a draft best: acceptance after the same steps on the same samples, from the
same start.

    python -m benchmarks.draft_losses runs/draft-smollm2 --steps 40 --seeds 3 --json FILE --plot PNG

Reads the samples, the configuration and (unless --start names another) the head of a
`jspec draft train` directory. A seed is an order of the samples; every loss goes through the same
one. Each 16th answer is kept from training, and acceptance is computed on those: the overlap of
both distributions at every depth, without the chance that rollouts of a few prompts have in them.
Seconds of a step are in the records: the losses cost the same.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

import jspec
from benchmarks import measure
from benchmarks.options import open_results
from jspec import cli
from jspec.base_model import BaseModel
from jspec.choices import DRAFT_LOSSES
from jspec.config import load_config
from jspec.draft_config import DraftTrainingConfig
from jspec.draft_training import samples, stages
from jspec.drafts import Draft
from jspec.errors import InputError
from jspec.model import Policy
from jspec.output import Output, screen
from jspec.prepare import named_drafter
from jspec.settings import refuse_changes

HELD_OUT = 16
FREE = ("model.dtype", "draft.learning_rate", "draft.optimizer", "draft.clip", "training.rows",
        "training.warmup_steps")
"""What overrides may change: how losses are compared. The rest made the samples, or is compared."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m benchmarks.draft_losses", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR",
                        help="output_dir of `jspec draft train`")
    parser.add_argument("overrides", metavar="key=value", nargs="*",
                        help="such as draft.learning_rate=3e-4")
    parser.add_argument("--start", metavar="HEAD",
                        help="the draft that all start from (default: DIR's)")
    parser.add_argument("--steps", type=int, default=40,
                        help="optimizer steps of each run (default: 40)")
    parser.add_argument("--seeds", type=int, default=3,
                        help="how many orders of the samples (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them there")
    args = parser.parse_intermixed_args(arguments)
    open_results(args)
    return args


def trained(config: DraftTrainingConfig, policy: Policy, draft: Draft, rows: list, kind: str,
            steps: int, seed: int) -> tuple[Draft, list[float]]:
    """The draft after `steps` steps on loss `kind`, and the seconds that each of them took."""
    optimizer = stages.draft_optimizer(config, stages.schedule(config, steps))
    learn = jax.jit(partial(stages.step_of, draft.drafter, draft.config, optimizer, kind))
    saved, seconds = {"weights": draft.weights, "opt": jax.jit(optimizer.init)(draft.weights)}, []
    for chosen in itertools.islice(stages.order(rows, config.training.rows, seed), steps):
        batch, begin = stages.pack([rows[i] for i in chosen]), time.perf_counter()
        saved, _ = jax.block_until_ready(learn(saved, policy, draft.state, batch))
        seconds.append(time.perf_counter() - begin)
    return draft.replace(weights=saved["weights"]), seconds


def measured(policy: Policy, draft: Draft, rows: list, size: int) -> dict[str, Any]:
    """Mean overlap at every depth where these answers went, and the tokens a cycle that it promises
    at k = depths."""
    overlaps = jax.jit(lambda draft, policy, batch: draft.drafter.loss(policy, draft, batch,
                                                                       "kl")[1:])
    total, count = 0.0, 0.0
    for at in range(0, len(rows), size):
        batch = stages.pack(rows[at:at + size])
        batch = batch.replace(trunk=jax.tree.map(lambda x: x.astype(policy.dtype), batch.trunk))
        tokens, metrics = jax.device_get(overlaps(draft, policy, batch))
        total, count = total + metrics["overlap"], count + tokens
    by_depth = np.asarray(total / count)
    return {"overlap_by_depth": by_depth.tolist(),
            "acceptance_length": float(1 + np.cumprod(by_depth).sum())}


def show(records: list[dict[str, Any]], title: str) -> None:
    table = Table("loss", "tokens a cycle, by seed", "mean", "seconds of a step", title=title)
    for kind in dict.fromkeys(record["loss"] for record in records):
        mine = [record for record in records if record["loss"] == kind]
        lengths = [record["acceptance_length"] for record in mine]
        table.add_row(kind, "  ".join(f"{x:.3f}" for x in lengths),
                      f"{statistics.mean(lengths):.3f}",
                      f"{statistics.median(record['step_seconds'] for record in mine):.2f}")
    screen().print(table)


def draw(records: list[dict[str, Any]], title: str, written: Output) -> None:
    """A point for each seed of each loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for record in records:
        axes.scatter(record["loss"], record["acceptance_length"], color=f"C{record['seed'] or 0}")
    axes.set(ylabel="tokens a cycle", title=title)
    axes.grid(alpha=0.3)
    written.save(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, 0. Raises InputError for a user's mistake."""
    args = parse(arguments)
    if not (args.directory / "samples").is_dir():
        raise InputError(f"{args.directory} has no samples: give the output_dir of `jspec draft "
                         "train`")
    path = args.directory / "config.yaml"
    config = load_config(path, args.overrides, DraftTrainingConfig)
    refuse_changes(args.directory, load_config(path, kind=DraftTrainingConfig), config, FREE,
                   f"what may be given here is {', '.join(FREE)}")
    if args.steps < 1 or args.seeds < 1:
        raise InputError(f"--steps {args.steps} --seeds {args.seeds}: give at least 1 of each")
    policy = BaseModel.of(config).policy()
    draft = jspec.load_draft(policy, args.start or args.directory, named_drafter(config))
    every = samples.read(args.directory / "samples")
    if len(every) <= HELD_OUT:
        raise InputError(f"{args.directory / 'samples'} has {len(every)} answers, and more than "
                         f"{HELD_OUT} are needed; give `jspec draft train` a larger samples.count")
    held_out = sorted(every[::HELD_OUT], key=lambda row: int(row["start"] + row["mask"].sum()))
    rows = [row for i, row in enumerate(every) if i % HELD_OUT]
    size = config.training.rows
    records = [{"loss": "none, the start", "seed": None, "steps": 0, "step_seconds": 0.0,
                **measured(policy, draft, held_out, size)}]
    for seed, kind in itertools.product(range(args.seeds), DRAFT_LOSSES):
        better, seconds = trained(config, policy, draft, rows, kind, args.steps, seed)
        records.append({"loss": kind, "seed": seed, "steps": args.steps,
                        "step_seconds": statistics.median(seconds),
                        **measured(policy, better, held_out, size)})
        title = f"{config.model.name}, {draft.name}, {args.steps} steps of {size} answers"
        measure.write_json(args.json, measure.report(records, overrides=args.overrides))
    show(records, title)
    if args.plot:
        draw(records, title, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
