"""Which loss trains a draft best: acceptance after the same steps on the same samples, from the same start.

    python benchmarks/draft_losses.py runs/draft-smollm2 --steps 40 --seeds 3 --json FILE --plot FILE.png

Reads the samples, the configuration and (unless --start names another) the head of a `jspec draft train` directory. A
seed is an order of the samples; every loss goes through the same one. Acceptance is that of rollouts on the prompts of
the directory's report. Losses cost the same: seconds of a step are in the records.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import jspec  # noqa: E402
from benchmarks import measure  # noqa: E402
from jspec import cli, hub  # noqa: E402
from jspec.config import DraftTrainingConfig, load_config  # noqa: E402
from jspec.draft_training import report, samples, stages  # noqa: E402
from jspec.draft_training.prompts import gather  # noqa: E402
from jspec.drafts import Draft  # noqa: E402
from jspec.drafts.parts.losses import LOSSES  # noqa: E402
from jspec.model import Policy  # noqa: E402
from jspec.prepare import make_policy  # noqa: E402
from jspec.rl.update import draft_optimizer  # noqa: E402


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="benchmarks/draft_losses.py", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="output_dir of `jspec draft train`")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as draft.learning_rate=3e-4")
    parser.add_argument("--start", metavar="HEAD", help="the draft that all start from (default: DIR/head)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default: 40)")
    parser.add_argument("--seeds", type=int, default=3, help="how many orders of the samples (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them there")
    return parser.parse_args(arguments)


def trained(config: DraftTrainingConfig, policy: Policy, draft: Draft, rows: list, kind: str, steps: int,
            seed: int) -> tuple[Draft, list[float]]:
    """The draft after `steps` steps on loss `kind`, and the seconds that each of them took."""
    optimizer = draft_optimizer(config.draft.optimizer, stages.schedule(config, steps), config.draft.clip)
    learn = jax.jit(partial(stages.step_of, draft.module, draft.config, optimizer, kind))
    saved, seconds = {"weights": draft.weights, "opt": jax.jit(optimizer.init)(draft.weights)}, []
    for chosen in itertools.islice(stages.order(rows, config.training.rows, seed), steps):
        batch, begin = stages.pack([rows[i] for i in chosen]), time.perf_counter()
        saved, _ = jax.block_until_ready(learn(saved, policy, draft.state, batch))
        seconds.append(time.perf_counter() - begin)
    return draft.replace(weights=saved["weights"]), seconds


def show(records: list[dict[str, Any]], title: str) -> None:
    table = Table("loss", "tokens a cycle, by seed", "mean", "seconds of a step", title=title)
    for kind in dict.fromkeys(record["loss"] for record in records):
        mine = [record for record in records if record["loss"] == kind]
        lengths = [record["acceptance_length"] for record in mine]
        table.add_row(kind, "  ".join(f"{x:.3f}" for x in lengths), f"{statistics.mean(lengths):.3f}",
                      f"{statistics.median(record['step_seconds'] for record in mine):.2f}")
    Console().print(table)


def draw(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """A point for each seed of each loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for record in records:
        axes.scatter(record["loss"], record["acceptance_length"], color=f"C{record['seed'] or 0}")
    axes.set(ylabel="tokens a cycle", title=title)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, 0. Raises InputError for a user's mistake."""
    args = parse(arguments)
    config = load_config(args.directory / "config.yaml", args.overrides, DraftTrainingConfig)
    policy = make_policy(config, tokenizer := hub.load_tokenizer(config.model.tokenizer or config.model.name))
    draft = jspec.load_draft(policy, args.start or args.directory / "head")
    prompts = gather(config, policy, tokenizer, args.directory).held_out
    rows, rollouts = samples.read(args.directory / "samples"), jspec.reshard(policy)

    def measured(draft: Draft) -> dict[str, Any]:
        return report.measure(config, rollouts, draft, prompts, "rejection", config.sampling.temperature)

    records = [{"loss": "none, the start", "seed": None, "steps": 0, "step_seconds": 0.0, **measured(draft)}]
    for seed, kind in itertools.product(range(args.seeds), LOSSES):
        better, seconds = trained(config, policy, draft, rows, kind, args.steps, seed)
        records.append({"loss": kind, "seed": seed, "steps": args.steps, "step_seconds": statistics.median(seconds),
                        **measured(better)})
        title = f"{config.model.name}, k = {config.report.k}: {args.steps} steps of {config.training.rows} answers"
        measure.write_json(args.json, measure.report(records, overrides=args.overrides))
    show(records, title)
    if args.plot:
        draw(records, title, Path(args.plot))
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
