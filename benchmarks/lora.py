"""Memory and seconds of a run with adapters against one that trains all weights.

    python -m benchmarks.lora --json benchmarks/results/lora_cpu.json
    python -m benchmarks.lora configs/tiny.yaml lora.rank=4

Each is `jspec train` in a process of its own, `--steps` steps from the start, twice: the first
compiles, and the second, which reads back what that compiled, counts. `peak MiB` is the most that
the process held (resident, everything included), `update s` the median of the steps after the
first.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import measure
from benchmarks.options import open_results, program
from jspec.console import PlainConsole
from jspec.metrics import read_records


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE",
                        help="of the run with adapters (default: lora.rank=16)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args(arguments)
    args.overrides = args.overrides or ["lora.rank=16"]
    open_results(args)
    return args


def trained(config: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """What a run held and took."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "jspec", "train", config, *overrides, f"steps={steps}",
             f"output_dir={folder}", f"checkpoint.every={steps}"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"jspec train {config} {' '.join(overrides)} ended with "
                             f"{process.returncode}")
        records = read_records(Path(folder) / "metrics.jsonl")[1:]
    return {"overrides": overrides, "peak_mib": usage.ru_maxrss / 1024,
            "update_seconds": statistics.median(r["seconds/update"] for r in records),
            "step_seconds": statistics.median(r["seconds/step"] for r in records),
            "logprob_gap": max(r["logprob_gap"] for r in records)}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    runs = {"all weights": [], "adapters": args.overrides}
    for overrides in runs.values():
        trained(args.config, overrides, args.steps)
    found = [{"trains": name, **trained(args.config, overrides, args.steps)}
             for name, overrides in runs.items()]
    table = Table("trains", "peak MiB", "of all", "update s", "of all", "logprob_gap")
    for run in found:
        shares = [run[key] / found[0][key] for key in ("peak_mib", "update_seconds")]
        table.add_row(run["trains"], f"{run['peak_mib']:,.0f}", f"{shares[0]:.0%}",
                      f"{run['update_seconds']:.3g}", f"{shares[1]:.0%}",
                      f"{run['logprob_gap']:.1e}")
    PlainConsole().print(table)
    measure.write_json(args.json, measure.report(found, config=args.config, steps=args.steps))
    return 0


if __name__ == "__main__":
    program(main)
