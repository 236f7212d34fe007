"""Run the peers and jspec in one sitting, in turn, and write all their figures as data.

    bash benchmarks/peers/install.sh PEERS                 # once; makes PEERS/tunix and PEERS/vllm
    python -m jspec export smollm2-135m-instruct PEERS/smollm2
    python benchmarks/versus.py PEERS --rounds 2 --json benchmarks/results/cpu.json
    python benchmarks/versus.py --show benchmarks/results/cpu.json

At SmolLM2-135M's shape, float32, 48 prompt and 64 new tokens. Each round runs every program once in a process of its
own; a program warms up before it counts, and is timed on prompts that its caches have not seen. Every system has all
cores that this process may use; `threads` in the data says how many of them each one computed on. Tables hold medians
over rounds and ratios of those medians.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.table import Table  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.options import open_results, program  # noqa: E402
from jspec.console import PlainConsole  # noqa: E402

HERE = Path(__file__).resolve().parent
# (what, peer, target: jspec over the peer, or for seconds the other way round)
TARGETS = [("batch 1, tok/s", "vllm", 1.5), ("batch 8, tok/s", "vllm", 1.0), ("batch 32, tok/s", "vllm", 1.0),
           ("batch 8, tok/s", "tunix", 1.5), ("batch 32, tok/s", "tunix", 1.5),
           ("GRPO step, 8 rows, s", "tunix", 1 / 0.65), ("GRPO step, 32 rows, s", "tunix", 1 / 0.65)]
REPEATED = "prompt that repeats itself, greedy, n-gram k = 3, batch 1, tok/s"


class Failed(Exception):
    """A program did not end well; the message has its last words."""


def run(command: list[str], timeout_s: float) -> list[dict[str, Any]]:
    """The JSON lines that a program prints. Raises Failed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"took over {timeout_s:.0f} s") from error
    if done.returncode:
        raise Failed(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def ours(script: str, arguments: list[str], timeout_s: float) -> list[dict[str, Any]]:
    """The rows that one of our own benchmarks writes. Raises Failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        run([sys.executable, str(HERE / script), *arguments, "--json", str(out)], timeout_s)
        return json.loads(out.read_text())["rows"]


def cores() -> int:
    """How many cores XLA computes on: all that this process may use."""
    return len(os.sched_getaffinity(0))


def rollouts(peers: Path, timeout_s: float):
    for row in ours("rollout.py", ["--batch", "1", "8", "32", "--rounds", "3"], timeout_s):
        yield "jspec", f"batch {row['batch']}, tok/s", row["tok_per_s"], cores()


def vllm(peers: Path, timeout_s: float):
    python = str(peers / "vllm" / "bin" / "python")
    command = [python, str(HERE / "peers" / "vllm_cpu_rollout.py"), str(peers / "smollm2"), "--batch", "1", "8", "32"]
    for row in run(command, timeout_s):
        yield "vllm", f"batch {row['batch']}, tok/s", row["tok_per_s"], row["threads"]


def steps(prompts: int) -> list[str]:
    return ["--prompts", str(prompts), "--group", "8", "--steps", "4"]


def tunix(peers: Path, timeout_s: float, prompts: int):
    python = str(peers / "tunix" / "bin" / "python")
    for row in run([python, str(HERE / "peers" / "tunix_grpo.py"), *steps(prompts)], timeout_s):
        yield "tunix", f"batch {8 * prompts}, tok/s", row["tok_per_s"], row["threads"]
        yield "tunix", f"GRPO step, {8 * prompts} rows, s", row["step_s"], row["threads"]


def grpo(peers: Path, timeout_s: float, prompts: int):
    for row in ours("grpo_step.py", steps(prompts), timeout_s):
        yield "jspec", f"GRPO step, {8 * prompts} rows, s", row["step"], cores()


def repeat(peers: Path, timeout_s: float):
    options = ["--weights", "smollm2-135m-instruct", "--prompt", "repeat", "--prompt-tokens", "160", "--batch", "1",
               "--drafts", "ngram", "--k", "3", "--temperature", "0", "--rounds", "3"]
    systems = {"none": "jspec, autoregressive", "ngram": "jspec"}
    for row in ours("rollout.py", options, timeout_s):
        if row["draft"] in systems:
            yield systems[row["draft"]], REPEATED, row["tok_per_s"], cores()


PROGRAMS = {"rollouts": rollouts, "vllm": vllm, "tunix8": partial(tunix, prompts=1), "grpo8": partial(grpo, prompts=1),
            "tunix32": partial(tunix, prompts=4), "grpo32": partial(grpo, prompts=4), "repeat": repeat}


def rows_of(found: dict[tuple[str, str], list[float]], threads: dict[str, int]) -> list[dict[str, Any]]:
    """Each comparison that was measured: medians, their ratio (above 1: jspec is faster) and its target."""
    rows = []
    for what, peer, target in [*TARGETS, (REPEATED, "jspec, autoregressive", 1.5)]:
        if not found["jspec", what] or not found[peer, what]:
            continue
        mine, theirs = (measure.median(found[system, what]) for system in ("jspec", peer))
        ratio = theirs / mine if what.endswith(", s") else mine / theirs
        rows.append({"what": what, "peer": peer, "jspec": mine, "theirs": theirs, "ratio": ratio, "target": target,
                     "jspec_all": found["jspec", what], "theirs_all": found[peer, what],
                     "jspec_threads": threads["jspec"], "their_threads": threads[peer]})
    return rows


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['date']}, commit {result['commit']}, {result['machine']['cpu']} "
                        f"x {result['machine']['cores']}, {result['rounds']} rounds")
    for name in ("what", "peer", "jspec", "theirs", "faster by", "target", "met"):
        table.add_column(name, justify="left" if name in ("what", "peer") else "right")
    for row in result["rows"]:
        table.add_row(row["what"], row["peer"], f"{row['jspec']:.1f}", f"{row['theirs']:.1f}", f"{row['ratio']:.2f}x",
                      f"{row['target']:.2f}x", "yes" if row["ratio"] >= row["target"] else "no")
    PlainConsole(width=max(120, PlainConsole().width)).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="?", type=Path, help="where install.sh put the peers, and smollm2 beside them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one program")
    parser.add_argument("--json", help="write the result there")
    parser.add_argument("--show", help="print the table of a result that was written before, and run nothing")
    args = parser.parse_args(arguments)
    open_results(args)
    if args.show:
        show(json.loads(Path(args.show).read_text()))
        return
    if not args.peers:
        parser.error("where are the peers? see --help")
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    threads: dict[str, int] = {}
    console = PlainConsole(stderr=True)
    for number in range(1, args.rounds + 1):
        for name in args.only:
            console.print(f"round {number}: {name} (load {os.getloadavg()[0]:.1f})")
            try:
                for system, what, value, used in PROGRAMS[name](args.peers, args.timeout):
                    found[system, what].append(value)
                    threads[system] = used
            except Failed as error:
                console.print(f"{name} failed: {error}", markup=False)
        result = measure.report(rows_of(found, threads), rounds=number)
        measure.write_json(args.json, result)
    show(result)


if __name__ == "__main__":
    program(main)
