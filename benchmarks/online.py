"""A draft that learns beside the policy against the same draft frozen, on the same policies as they
move.

    python -m benchmarks.online configs/tiny.yaml --every 20 --json FILE --plot FILE.png

One run of `jspec train`, stopped every so many steps. The frozen draft is the run's own as it was
at the first stop; from then on both drafts continue the same prompts of the run's task under each
stop's policy. One run is enough: under the coupled rule, which this sets, no draft changes what a
policy learns.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

import jspec
from benchmarks import measure
from benchmarks.options import open_results
from jspec import cli
from jspec.base_model import BaseModel
from jspec.choices import DRAFTERS
from jspec.config import Config, load_config
from jspec.drafts import Draft, find
from jspec.errors import InputError
from jspec.metrics import read_records
from jspec.model import Policy
from jspec.output import Output, screen
from jspec.prepare import make_sampling, make_speculation, named_drafter
from jspec.purposes import BENCH_KEY, purpose_key, purpose_seed
from jspec.rl.prompts import PromptData
from jspec.run_dir import load_run
from jspec.train import train

LEARNERS = [name for name in DRAFTERS if find(name).loss is not None]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m benchmarks.online", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/tiny.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*",
                        help="such as grpo.learning_rate=1e-5")
    parser.add_argument("--every", type=int, default=20,
                        help="steps between two stops (default: 20)")
    parser.add_argument("--batches", type=int, default=4,
                        help="of prompts_per_step prompts, measured at each stop (default: 4)")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw both curves and the reward there")
    args = parser.parse_intermixed_args(arguments)
    open_results(args)
    return args


def accepted(config: Config, policy: Policy, draft: Draft, batches: int) -> dict[str, Any]:
    """Tokens a cycle, and acceptance by position, over prompts of the run's task."""
    data = PromptData(config.data, BaseModel.of(config).tokenizer,
                      seed=purpose_seed(config.seed, BENCH_KEY))
    tokens, cycles = 0, 0
    drafted: Any = 0
    taken: Any = 0
    for index in range(batches):
        key = jax.random.fold_in(purpose_key(config.seed, BENCH_KEY), index)
        prompts = jspec.PromptBatch.from_tokens([prompt.tokens for prompt in next(data)], seed=key,
                                                group_size=config.data.group_size,
                                                buckets=(config.data.max_prompt_tokens,))
        out = jax.device_get(jspec.rollout(policy, draft, prompts, sampling=make_sampling(config),
                                           speculation=make_speculation(config)))
        tokens, cycles = tokens + int(out.lengths.sum()), cycles + int(out.stats.cycles.sum())
        drafted, taken = drafted + out.stats.drafted, taken + out.stats.accepted
    return {"acceptance_length": tokens / cycles,
            "acceptance_by_position": (taken / drafted.clip(1)).tolist()}


def run(config: Config, every: int, batches: int) -> Iterator[dict[str, Any]]:
    """A record for each stop."""
    frozen = None
    for step in [*range(every, config.steps, every), config.steps]:
        if train(dataclasses.replace(config, steps=step)):
            raise InputError(f"the run ended before step {step}; see what it says above")
        _, policy, draft = load_run(config.output_dir, drafter=named_drafter(config))
        frozen = draft if frozen is None else frozen
        policy = jspec.reshard(policy)
        rewards = [record["reward"]
                   for record in read_records(Path(config.output_dir) / "metrics.jsonl")]
        rewards = rewards[(step - 1) // every * every:]  # since the stop before
        yield {"step": step, "reward": sum(rewards) / len(rewards),
               "online": accepted(config, policy, draft, batches),
               "frozen": accepted(config, policy, frozen, batches)}


def show(records: list[dict[str, Any]], title: str) -> None:
    table = Table("step", "reward", "online, tokens a cycle", "frozen, tokens a cycle", title=title)
    for record in records:
        table.add_row(str(record["step"]), f"{record['reward']:.3f}",
                      *(f"{record[name]['acceptance_length']:.2f}"
                        for name in ("online", "frozen")))
    screen().print(table)


def draw(records: list[dict[str, Any]], title: str, written: Output) -> None:
    """Tokens a cycle of both drafts over steps, and the policy's reward on an axis of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in records]
    for name, color in (("online", "C0"), ("frozen", "C3")):
        axes.plot(steps, [record[name]["acceptance_length"] for record in records], marker="o",
                  color=color, label=f"{name} draft")
    axes.set(xlabel="step", ylabel="tokens a cycle", title=title)
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(steps, [record["reward"] for record in records], color="0.6", linestyle="--",
               label="reward")
    right.set(ylabel="mean reward since the stop before", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=3)
    written.save(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, 0. Raises InputError for a user's mistake."""
    args = parse(arguments)
    for text in args.overrides:
        if text.startswith(("output_dir", "checkpoint", "speculation.rule")):
            raise InputError(f"{text}: this benchmark sets it itself; leave it out")
    with tempfile.TemporaryDirectory() as directory:
        config = load_config(args.config, [*args.overrides, f"output_dir={directory}/run",
                                           f"checkpoint.every={args.every}",
                                           "speculation.rule=coupled"])
        if not 1 <= args.every <= config.steps or args.batches < 1:
            raise InputError(f"--every {args.every} --batches {args.batches}: give at least 1, and "
                             f"no more than the {config.steps} steps of the run")
        if (not config.draft.trains or config.draft.name == "none"
            or named_drafter(config).loss is None):
            raise InputError(f"draft.name={config.draft.name} "
                             f"draft.train={str(config.draft.train).lower()}: nothing learns; give "
                             f"one of {', '.join(LEARNERS)}, and draft.train=true")
        if config.speculation.k == "auto":  # the same for both drafts, whatever they are worth
            config = dataclasses.replace(config,
                                         speculation=dataclasses.replace(config.speculation, k=3))
        # every stretch compiles the same
        jax.config.update("jax_compilation_cache_dir", f"{directory}/compiled")
        records, name = [], Path(args.config).stem
        for record in run(config, args.every, args.batches):
            records.append(record)
            measure.write_json(args.json,
                               measure.report(records, config=name, overrides=args.overrides))
    title = (f"{name}: a draft trained beside its policy, and the same one frozen at step "
             f"{args.every}")
    show(records, title)
    if args.plot:
        draw(records, title, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
