"""`jspec fit` for five machines that are not here: what it answers, and what asking costs.

    pip install -e '.[aot]' && python -m benchmarks.fit --json benchmarks/results/fit.json

Each answer is a process of its own, and compiles for minutes: `--only` asks for some of them, and
leaves the others in the file as they are.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.options import open_results, program

SHORT = ("speculation.k=3",)  # one k, so that the chain's loops draft as many
TARGETS: dict[str, tuple[str, ...]] = {
    "v5e-16": ("qwen3-8b-pod", "mesh.fsdp=4", "rollout.slots=256", "grpo.micro_batch=4",
               "speculation.k=[[64,3]]"),
    "v5p-64": ("qwen3-30b-a3b-pod", *SHORT),
    "v6e-64": ("qwen3-30b-a3b-pod", "mesh.fsdp=8", "rollout.slots=512", "grpo.micro_batch=64",
               "sampling.max_new_tokens=4096", *SHORT),
    "v5p-1024": ("qwen3-235b-a22b-pod", *SHORT),
    "tpu7x-128": ("qwen3-235b-a22b-pod", "mesh.fsdp=8", "rollout.slots=1024",
                  "grpo.micro_batch=32", *SHORT),
}
"""By machine, the config of `configs/` that is asked about, and what of it is set otherwise."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", help="write the result there")
    args = parser.parse_args(arguments)
    open_results(args)
    return args


def answered(machine: str) -> dict[str, Any]:
    """A row: the answer, and seconds and memory of the process that gave it."""
    config, *overrides = TARGETS[machine]
    command = ["fit", f"configs/{config}.yaml", "--on", machine, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        path, begin = Path(folder) / "answer.json", time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "jspec", *command, "--json", str(path)],
                              cwd=measure.ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = time.perf_counter() - begin
        answer: dict[str, Any] = {"failed": done.returncode}
        if path.is_file():
            answer = json.loads(path.read_text())
    return {"command": " ".join(["jspec", *command]), "seconds": round(seconds),
            "cpu_seconds": round(sum(after[:2]) - sum(before[:2])),
            "peak_rss_gib": round(after.ru_maxrss / 2**20, 2), "commit": measure.commit(),
            "load_average": measure.machine()["load_average"], **answer}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    old = args.json.path.read_text() if args.json and args.json.path.is_file() else ""
    rows = {row["topology"]: row for row in (json.loads(old)["rows"] if old else [])}
    for machine in args.only:
        row = answered(machine)
        rows[row.get("topology", machine)] = row
        found = [rows[name] for name in TARGETS if name in rows]
        measure.write_json(args.json, measure.report(found))  # of an hour nothing is lost
    return int(any("failed" in row for row in rows.values()))


if __name__ == "__main__":
    program(main)
