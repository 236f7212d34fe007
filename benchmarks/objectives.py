"""Every objective on the tiny run: the reward by step.

    python -m benchmarks.objectives configs/tiny.yaml grpo.entropy_weight=0.02 --runs FOLDER \
        --json FILE --plot FILE.png

A run of `jspec train` for each, one after the other, in folders of their own; one that is there and
done is not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.options import open_results
from benchmarks.plot_run import smooth
from jspec import cli
from jspec.choices import OBJECTIVES
from jspec.config import load_config
from jspec.errors import InputError
from jspec.metrics import read_records
from jspec.output import Output

OWN = {"dr_grpo": ["grpo.entropy_weight=0.02"]}
"""Further overrides of one: its advantages are not divided by a deviation, so that a bonus that
suits the others outweighs them."""
LAST = 10
"""Steps that a run's last reward is a mean over."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m benchmarks.objectives", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/tiny.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*",
                        help="such as grpo.entropy_weight=0.02")
    parser.add_argument("--runs", metavar="FOLDER", type=Path, required=True,
                        help="where the runs are written to")
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES),
                        help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rewards there")
    args = parser.parse_intermixed_args(arguments)
    open_results(args)
    return args


def learned(config: str, overrides: Sequence[str], folder: Path, name: str) -> dict[str, Any]:
    """A record of the run with an objective, which is made where it is not there."""
    own = OWN.get(name, [])
    settings = [*overrides, *own, f"grpo.objective={name}", f"output_dir={folder / name}"]
    steps = load_config(config, settings).steps
    path = folder / name / "metrics.jsonl"
    if not path.exists() or len(read_records(path)) < steps:
        done = subprocess.run([sys.executable, "-m", "jspec", "train", config, *settings])
        if done.returncode:
            raise InputError(f"{name}: the run ended with exit code {done.returncode}; see what it "
                             "says above")
    records = read_records(path)
    rewards = [record["reward"] for record in records]
    last = rewards[-LAST:]
    return {"objective": name, "overrides": own, "last": sum(last) / len(last), "reward": rewards,
            "above_four_fifths": next((i for i, x in enumerate(smooth(rewards, LAST), 1)
                                       if x > 0.8), None),
            "seconds": sum(record["seconds/step"] for record in records)}


def draw(records: Sequence[dict[str, Any]], title: str, written: Output) -> None:
    """The rewards over steps, each a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, record in enumerate(records):
        axes.plot(range(1, 1 + len(record["reward"])), smooth(record["reward"], 5),
                  color=f"C{i}", linestyle="-" if i % 2 else "--",
                  label=f"{record['objective']} ({record['last']:.2f})")
    axes.axhline(0.8, color="0.7", linewidth=1, zorder=0)
    axes.set(xlabel="step", ylabel="mean reward, of 5 steps", title=title, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small", title=f"(mean of the last {LAST})")
    written.save(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, 0. Raises InputError for a user's mistake."""
    args = parse(arguments)
    for text in args.overrides:
        if text.startswith(("output_dir", "grpo.objective")):
            raise InputError(f"{text}: this benchmark sets it itself; leave it out")
    records, name = [], Path(args.config).stem
    for objective in args.only:
        records.append(learned(args.config, args.overrides, args.runs, objective))
        measure.write_json(args.json,
                           measure.report(records, config=name, overrides=args.overrides))
    for record in records:
        print(f"{record['objective']:<30} {record['last']:.3f}  above 0.8 at step "
              f"{record['above_four_fifths']}  {record['seconds']:.0f} s")
    if args.plot:
        draw(records, " ".join([name, *args.overrides]), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
