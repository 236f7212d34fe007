"""Which drafter is the best after the same seconds of training on the same samples.

    python -m benchmarks.trained_equally DIR --seconds 240 --seeds 3 --json FILE --plot PNG

Samples SmolLM2's own answers into DIR, once, with the states that any of the drafters reads; then
trains each drafter from its fresh start, in the processor seconds of all cores (other programs do
not count), and says how many tokens a cycle it would make at k = 7 where held-out answers went
(temperature 1). So the curve of a drafter is that of its recipe: `mtp` begins with least squares
and next states, as `jspec draft train` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Sequence
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
from jspec.config import load_config
from jspec.draft_config import DraftTrainingConfig
from jspec.draft_training import prompts, samples, stages
from jspec.drafts import Draft
from jspec.drafts.parts.vocabulary import most_frequent
from jspec.errors import InputError
from jspec.model import Policy
from jspec.output import Output, screen

K, HELD_OUT, VOCAB = 7, 16, 12288
MOST_STEPS = 100_000
RECIPES: dict[str, dict[str, Any]] = {
    "mtp": {"options": {"depths": 1}, "states": 0.25, "loss": "kl"},
    "eagle3": {"options": {"depths": 1}, "states": 0.25, "loss": "kl"},
    "dflash": {"options": {}, "states": 0.25, "loss": "kl"},
    "dspark": {"options": {}, "states": 0.25, "loss": "kl"},
}
"""Of each drafter its options, which share of the time goes to next states, and the loss after."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m benchmarks.trained_equally", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the samples are, or go")
    parser.add_argument("--answers", type=int, default=768, help="samples (default: 768)")
    parser.add_argument("--seconds", type=float, default=240.0,
                        help="of all cores together, of each training (default: 240)")
    parser.add_argument("--points", type=int, default=4, help="of each curve (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, help="orders of the samples (default: 3)")
    parser.add_argument("--drafts", default=",".join(RECIPES), help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5e-4, help="Muon's (default: 5e-4)")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them there")
    args = parser.parse_args(arguments)
    for name in args.drafts.split(","):
        if name not in RECIPES:
            raise InputError(f"--drafts {name} is unknown; known: {', '.join(RECIPES)}")
    open_results(args)
    return args


def settings(args: argparse.Namespace, seed: int = 0) -> DraftTrainingConfig:
    return load_config(None, [
        "model.name=smollm2-135m-instruct", f"output_dir={args.directory}", f"seed={seed}",
        "samples.sources=[self,arithmetic]", f"samples.count={args.answers}", "samples.batch=64",
        "sampling.max_new_tokens=96", "training.rows=24", "draft.optimizer=muon",
        f"draft.learning_rate={args.rate}"], DraftTrainingConfig)


def fresh(name: str, policy: Policy, vocab: np.ndarray, seed: int) -> Draft:
    make = getattr(jspec.drafts, name)
    return make(policy, jax.random.key(seed), vocab=vocab, **RECIPES[name]["options"])


def sampled(args: argparse.Namespace, base: BaseModel, policy: Policy,
            depths: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    """Rows with the states of all the depths."""
    config = settings(args)
    args.directory.mkdir(parents=True, exist_ok=True)
    found = prompts.gather(config, policy, base.tokenizer, args.directory)
    samples.sample(config, policy, found.training, args.directory / "samples", depths)
    return samples.read(args.directory / "samples")


def of_draft(rows: list[dict], draft: Draft, depths: tuple[int, ...]) -> list[dict]:
    """The rows with the states that the draft reads."""
    wanted = [1 + depths.index(d) for d in draft.drafter.features(draft.config)]
    return [{**{name: x for name, x in row.items() if not name.startswith("state")},
             "state0": row["state0"], **{f"state{i + 1}": row[f"state{at}"]
                                         for i, at in enumerate(wanted)}} for row in rows]


class Learner:
    """One draft in training; its clock counts processor seconds, compilation left out."""

    def __init__(self, config: DraftTrainingConfig, policy: Policy, draft: Draft, rows: list,
                 seed: int) -> None:
        self.config, self.policy, self.draft, self.rows = config, policy, draft, rows
        self.order = stages.order(rows, config.training.rows, seed)
        self.seconds, self.steps, self.programs = 0.0, 0, {}

    def solve(self) -> None:
        begin = time.process_time()
        self.draft = stages.solved(self.config, self.policy, self.draft, self.rows)
        self.seconds += time.process_time() - begin

    def learn(self, kind: str, until: float) -> None:
        """Steps on a loss at a constant rate until the clock says so. A shape's first step is not
        counted: most of it is compilation."""
        optimizer = stages.draft_optimizer(self.config, self.config.draft.learning_rate)
        saved = {"weights": self.draft.weights,
                 "opt": jax.jit(optimizer.init)(self.draft.weights)}
        program = jax.jit(lambda *args: stages.step_of(self.draft.drafter, self.draft.config,
                                                       optimizer, kind, *args))
        seen: set[tuple] = set()
        while self.seconds < until and self.steps < MOST_STEPS:
            batch = stages.pack([self.rows[i] for i in next(self.order)])
            batch = batch.replace(turn=np.int32(self.steps))
            begin = time.process_time()
            saved, _ = jax.block_until_ready(program(saved, self.policy, self.draft.state, batch))
            self.steps += 1
            if batch.tokens.shape + batch.mask.shape in seen:
                self.seconds += time.process_time() - begin
            seen.add(batch.tokens.shape + batch.mask.shape)
        self.draft = self.draft.replace(weights=saved["weights"])


def acceptance(policy: Policy, draft: Draft, rows: list, size: int) -> list[float]:
    """How often a draft is accepted at each of K positions if those before it were."""
    if hasattr(draft.config, "depths"):
        draft = draft.replace(config=dataclasses.replace(draft.config, depths=K))
    overlaps = jax.jit(lambda draft, policy, batch: draft.drafter.loss(policy, draft, batch,
                                                                       "kl")[1:])
    total, count = 0.0, 0.0
    for at in range(0, len(rows), size):
        batch = stages.pack(rows[at:at + size])
        batch = batch.replace(trunk=jax.tree.map(lambda x: x.astype(policy.dtype), batch.trunk))
        tokens, metrics = jax.device_get(overlaps(draft, policy, batch))
        total, count = total + metrics["overlap"], count + tokens
    return np.asarray(total / count)[:K].tolist()


def curve(args: argparse.Namespace, name: str, seed: int, policy: Policy, rows: list,
          vocab: np.ndarray, depths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Records of one drafter along its training."""
    draft = fresh(name, policy, vocab, seed)
    mine = of_draft(rows, draft, depths)
    held_out = sorted(mine[::HELD_OUT], key=lambda row: int(row["start"] + row["mask"].sum()))
    training = [row for i, row in enumerate(mine) if i % HELD_OUT]
    config, recipe = settings(args, seed), RECIPES[name]
    learner, records = Learner(config, policy, draft, training, seed), []
    learner.solve()
    learner.learn("states", recipe["states"] * args.seconds)
    for point in range(1, args.points + 1):
        share = recipe["states"] + (1 - recipe["states"]) * point / args.points
        learner.learn(recipe["loss"], share * args.seconds)
        by_depth = acceptance(policy, learner.draft, held_out, config.training.rows)
        records.append({"draft": name, "seed": seed, "seconds": round(learner.seconds, 1),
                        "steps": learner.steps, "overlap_by_depth": by_depth,
                        "acceptance_length": float(1 + np.cumprod(by_depth).sum())})
        print(f"{name} seed {seed}: {learner.seconds:.0f} s, {learner.steps} steps, "
              f"{records[-1]['acceptance_length']:.3f} tokens a cycle, "
              f"{' '.join(f'{x:.2f}' for x in by_depth)}", flush=True)
    return records


def show(records: list[dict[str, Any]], title: str) -> None:
    table = Table("draft", "seconds", "tokens a cycle at k = 7, by seed", "mean", title=title)
    last = max(record["seconds"] for record in records)
    for name in dict.fromkeys(record["draft"] for record in records):
        ends = [max((r for r in records if r["draft"] == name and r["seed"] == seed),
                    key=lambda r: r["seconds"])["acceptance_length"]
                for seed in dict.fromkeys(r["seed"] for r in records)]
        table.add_row(name, f"{last:.0f}", "  ".join(f"{x:.3f}" for x in ends),
                      f"{np.mean(ends):.3f}")
    screen().print(table)


def draw(records: list[dict[str, Any]], title: str, written: Output) -> None:
    """A line for each drafter and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(record["draft"] for record in records))
    for name, seed in itertools.product(names, dict.fromkeys(r["seed"] for r in records)):
        mine = [r for r in records if (r["draft"], r["seed"]) == (name, seed)]
        axes.plot([r["seconds"] for r in mine], [r["acceptance_length"] for r in mine], ".-",
                  color=f"C{names.index(name)}", label=None if seed else name)
    axes.set(xlabel="processor seconds of training", ylabel="tokens a cycle, k = 7", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    written.save(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, 0. Raises InputError for a user's mistake."""
    args = parse(arguments)
    base = BaseModel.of(settings(args))
    policy, names = base.policy(), args.drafts.split(",")
    config = jax.eval_shape(lambda p: [fresh(n, p, np.arange(VOCAB), 0) for n in RECIPES], policy)
    depths = tuple(sorted({d for draft in config for d in draft.drafter.features(draft.config)}))
    rows = sampled(args, base, policy, depths)
    emitted = np.concatenate([row["tokens"][row["start"]:row["start"] + row["mask"].sum()]
                              for row in rows])
    vocab = most_frequent(emitted, VOCAB, policy.config.vocab_size)
    records = []
    for seed, name in itertools.product(range(args.seeds), names):
        records += curve(args, name, seed, policy, rows, vocab, depths)
        measure.write_json(args.json, measure.report(records))  # the next one takes minutes
    title = f"{len(rows)} answers, {len(emitted)} tokens, {os.cpu_count()} cores"
    show(records, title)
    if args.plot:
        draw(records, title, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
