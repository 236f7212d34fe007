"""Memory and seconds of a run with adapters against one that trains all weights.

    python -m benchmarks.lora --json benchmarks/results/lora_cpu.json
    python -m benchmarks.lora configs/tiny.yaml speculation.k=1

Each is `jspec train` in a process of its own, `--steps` steps from the start, twice: the first
compiles, and the second, which reads back what that compiled, counts. `process` is the most memory
that it held (resident, everything included), `programs` what the largest of a step's programs needs
on the device, as compiled (`jspec profile`), `update s` the median of the steps after the first.
"""

import argparse
import json
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

RUNS = {"all weights": [], "adapters": ["lora.rank=16"],
        "adapters, int8": ["lora.rank=16", "lora.base_dtype=int8"]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all the runs")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args(arguments)
    open_results(args)
    return args


def programs_mib(config: str, overrides: list[str]) -> float:
    """What the largest of the step's programs needs, arguments included."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "jspec", "profile", config, *overrides,
                        "profile.repeats=1", "--out", folder], stdout=subprocess.DEVNULL,
                       check=True)
        memory = json.loads((Path(folder) / "profile.json").read_text())["memory_bytes"]
    return max(program["peak"] for program in memory.values()) / 2**20


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
    runs = {name: [*args.overrides, *own] for name, own in RUNS.items()}
    for overrides in runs.values():
        trained(args.config, overrides, args.steps)
    found = [{"trains": name, **trained(args.config, overrides, args.steps),
              "programs_mib": programs_mib(args.config, overrides)}
             for name, overrides in runs.items()]
    table = Table("trains", "process", "of all", "programs", "of all", "update s", "of all", "gap")
    for run in found:
        shares = [run[key] / found[0][key]
                  for key in ("peak_mib", "programs_mib", "update_seconds")]
        table.add_row(run["trains"], f"{run['peak_mib']:,.0f}", f"{shares[0]:.0%}",
                      f"{run['programs_mib']:,.0f}", f"{shares[1]:.0%}",
                      f"{run['update_seconds']:.3g}", f"{shares[2]:.0%}",
                      f"{run['logprob_gap']:.1e}")
    PlainConsole().print(table)
    measure.write_json(args.json, measure.report(found, config=args.config, steps=args.steps))
    return 0


if __name__ == "__main__":
    program(main)
