"""Draw a run: reward, tokens a cycle and where its seconds went, from its metrics.jsonl.

    python -m benchmarks.plot_run runs/tiny docs/tiny.png

Needs matplotlib (the `dev` extra).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from jspec.clock import PHASES
from jspec.metrics import phase_medians, read_records


def smooth(values: list[float], window: int) -> np.ndarray:
    """Running mean over the latest `window` values."""
    return np.array([np.mean(values[max(0, i - window + 1): i + 1]) for i in range(len(values))])


def draw(records: list[dict], title: str, out: Path) -> None:
    steps = [r["step"] for r in records]
    window = max(1, len(records) // 40)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.6), constrained_layout=True)
    for axis, key, label in ((left, "reward", "mean reward"),
                             (middle, "acceptance_length", "tokens a cycle")):
        values = [r[key] for r in records]
        axis.plot(steps, values, color="0.8", linewidth=1)
        axis.plot(steps, smooth(values, window), color="C0", linewidth=2)
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    left.set_ylim(0, 1.02)
    seconds = phase_medians(records)
    right.barh(PHASES[::-1], [seconds[phase] for phase in PHASES[::-1]], color="C1")
    right.set(title="seconds of a step (median)")
    right.grid(alpha=0.3, axis="x")
    figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's output_dir")
    parser.add_argument("out", type=Path, help="the .png to write")
    args = parser.parse_args()
    records = read_records(args.run / "metrics.jsonl")
    if not records:
        parser.error(f"{args.run / 'metrics.jsonl'} has no records")
    draw(records, args.run.name, args.out)
    print(json.dumps({"steps": len(records), "out": str(args.out)}))


if __name__ == "__main__":
    main()
