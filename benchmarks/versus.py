"""Run the peers and jspec in one sitting, in turn, and write all their figures as data.

    bash benchmarks/peers/install.sh PEERS                 # once; makes PEERS/tunix and PEERS/vllm
    python -m jspec export smollm2-135m-instruct PEERS/smollm2
    python -m benchmarks.versus PEERS --rounds 2 --json benchmarks/results/cpu.json
    python -m benchmarks.versus PEERS --only tail tail_baseline tail_vllm --baseline CHECKOUT
    python -m benchmarks.versus --show benchmarks/results/cpu.json

At SmolLM2-135M's shape, float32. Of the heavy tail (tail.py), 32 answers to held-out prompts by the
model itself, each as long as it makes it up to 512 tokens, useful tokens are counted, and `answers`
in the data says how long they were; everything else has 48 prompt and 64 new tokens. `--baseline`
times another checkout of jspec on the heavy tail as well.

Each round runs every program once in a process of its own; a program warms up before it counts, and
is timed on prompts that its caches have not seen. Every system has all cores that this process may
use; `threads` in the data says how many of them each one computed on. Tables hold medians over
rounds and ratios of those medians.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks import measure
from benchmarks.options import open_results, program
from jspec.console import PlainConsole

HERE = Path(__file__).resolve().parent
HELDOUT = HERE / "prompts" / "heldout.jsonl"
# (what, peer, target: jspec over the peer, or for seconds the other way round)
TARGETS = [("heavy tail, tok/s", "vllm", 1.5), ("heavy tail, no draft, tok/s", "vllm", 1.2),
           ("heavy tail, tok/s", "baseline", 4.0), ("heavy tail, GRPO step, tok/s", "tunix", 3.0),
           ("batch 1, tok/s", "vllm", 1.6), ("batch 8, tok/s", "vllm", 1.4),
           ("batch 32, tok/s", "vllm", 1.3), ("batch 8, tok/s", "tunix", 1.5),
           ("batch 32, tok/s", "tunix", 1.5), ("GRPO step, 8 rows, s", "tunix", 1 / 0.65),
           ("GRPO step, 32 rows, s", "tunix", 1 / 0.65)]
TAIL = ["smollm2-135m-instruct", "--dtype", "float32"]
TAIL_DRAFT = ["--drafts", "mtp", "--k", "auto"]
# a file of this checkout with the packages of another, the one that is the current folder
ELSEWHERE = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](sys.argv[2:])"
REPEATED = "prompt that repeats itself, greedy, n-gram k = 3, batch 1, tok/s"


class Failed(Exception):
    """A program did not end well; the message has its last words."""


class Figure(NamedTuple):
    """What one program says of one system. answers: how long they were, where that is not given."""

    system: str
    what: str
    value: float
    threads: int
    answers: Mapping[str, Any] | None = None


def run(command: list[str], timeout_s: float, checkout: Path = HERE.parent) -> list[dict[str, Any]]:
    """The JSON lines that a program prints, run in a checkout of jspec. Raises Failed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(checkout)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s,
                              env=environment, cwd=checkout)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"took over {timeout_s:.0f} s") from error
    if done.returncode:
        raise Failed(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def ours(name: str, arguments: list[str], timeout_s: float,
         checkout: Path | None = None) -> list[dict[str, Any]]:
    """The rows that one of our own benchmarks writes, run in this checkout or in another, which may
    be too old to have that benchmark: then it is this one's, on the other's packages. Raises
    Failed."""
    checkout = checkout or HERE.parent
    there = (checkout / "benchmarks" / f"{name}.py").is_file()
    start = ["-m", f"benchmarks.{name}"] if there else ["-c", ELSEWHERE, str(HERE / f"{name}.py")]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        run([sys.executable, *start, *arguments, "--json", str(out)], timeout_s, checkout)
        return json.loads(out.read_text())["rows"]


def cores() -> int:
    """How many cores XLA computes on: all that this process may use."""
    return len(os.sched_getaffinity(0))


def rollouts(args: argparse.Namespace) -> Iterator[Figure]:
    for row in ours("rollout", ["--batch", "1", "8", "32", "--rounds", "3"], args.timeout):
        yield Figure("jspec", f"batch {row['batch']}, tok/s", row["tok_per_s"], cores())


def peer(args: argparse.Namespace, environment: str, script: str,
         *arguments: str) -> list[dict[str, Any]]:
    """The lines that one of the peers' programs prints. Raises Failed."""
    python = args.peers / environment / "bin" / "python"
    return run([str(python), str(HERE / "peers" / script), *arguments], args.timeout)


def vllm(args: argparse.Namespace) -> Iterator[Figure]:
    for row in peer(args, "vllm", "vllm_cpu_rollout.py", str(args.peers / "smollm2"), "--batch",
                    "1", "8", "32"):
        yield Figure("vllm", f"batch {row['batch']}, tok/s", row["tok_per_s"], row["threads"])


def steps(prompts: int) -> list[str]:
    return ["--prompts", str(prompts), "--group", "8", "--steps", "4"]


def tunix(args: argparse.Namespace, prompts: int) -> Iterator[Figure]:
    for row in peer(args, "tunix", "tunix_grpo.py", *steps(prompts)):
        yield Figure("tunix", f"batch {8 * prompts}, tok/s", row["tok_per_s"], row["threads"])
        yield Figure("tunix", f"GRPO step, {8 * prompts} rows, s", row["step_s"], row["threads"])


def grpo(args: argparse.Namespace, prompts: int) -> Iterator[Figure]:
    for row in ours("grpo_step", steps(prompts), args.timeout):
        yield Figure("jspec", f"GRPO step, {8 * prompts} rows, s", row["step"], cores())


def repeat(args: argparse.Namespace) -> Iterator[Figure]:
    options = ["--weights", "smollm2-135m-instruct", "--prompt", "repeat", "--prompt-tokens", "160",
               "--batch", "1",
               "--drafts", "ngram", "--k", "3", "--temperature", "0", "--rounds", "3"]
    systems = {"none": "jspec, autoregressive", "ngram": "jspec"}
    for row in ours("rollout", options, args.timeout):
        if row["draft"] in systems:
            yield Figure(systems[row["draft"]], REPEATED, row["tok_per_s"], cores())


def answers(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of the heavy tail says of its answers and of the loops that made them."""
    return {name: row[name] for name in ("tokens", "mean", "median", "largest", "occupancy",
                                         "step_s", "seconds") if row.get(name) is not None}


def tail(args: argparse.Namespace) -> Iterator[Figure]:
    for row in ours("tail", [*TAIL, *TAIL_DRAFT, "--seed", str(args.round)], args.timeout):
        what = "heavy tail, no draft, tok/s" if row["draft"] == "none" else "heavy tail, tok/s"
        yield Figure("jspec", what, row["tok_per_s"], cores(), answers(row))


def tail_baseline(args: argparse.Namespace) -> Iterator[Figure]:
    """Of the other checkout what was fastest there: no draft."""
    for row in ours("tail", [*TAIL, "--seed", str(args.round)], args.timeout, args.baseline):
        yield Figure("baseline", "heavy tail, tok/s", row["tok_per_s"], cores(), answers(row))


def tail_vllm(args: argparse.Namespace) -> Iterator[Figure]:
    for row in peer(args, "vllm", "vllm_tail.py", str(args.peers / "smollm2"), str(HELDOUT),
                    "--seed", str(args.round)):
        for what in ("heavy tail, tok/s", "heavy tail, no draft, tok/s"):
            yield Figure("vllm", what, row["tok_per_s"], row["threads"], answers(row))


def tail_grpo(args: argparse.Namespace) -> Iterator[Figure]:
    for row in ours("tail", [*TAIL, "--grpo", "--seed", str(args.round)], args.timeout):
        yield Figure("jspec", "heavy tail, GRPO step, tok/s", row["tok_per_s"], cores(),
                     answers(row))


def tail_tunix(args: argparse.Namespace) -> Iterator[Figure]:
    # four rows at a time: by count, the update of all 32 at the cap takes over 30 GB
    options = ["--model", str(args.peers / "smollm2"), "--prompts-file", str(HELDOUT), "--prompts",
               "8", "--group", "4", "--prompt-tokens", "128", "--new-tokens", "512",
               "--micro-batch", "1", "--steps", "2"]
    for row in peer(args, "tunix", "tunix_grpo.py", *options, "--seed", str(args.round)):
        yield Figure("tunix", "heavy tail, GRPO step, tok/s", row["tokens"] / row["step_s"],
                     row["threads"], answers(row))


PROGRAMS: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    "tail": tail, "tail_baseline": tail_baseline, "tail_vllm": tail_vllm, "tail_grpo": tail_grpo,
    "tail_tunix": tail_tunix, "rollouts": rollouts, "vllm": vllm,
    "tunix8": partial(tunix, prompts=1), "grpo8": partial(grpo, prompts=1),
    "tunix32": partial(tunix, prompts=4), "grpo32": partial(grpo, prompts=4), "repeat": repeat}


def rows_of(figures: list[Figure]) -> list[dict[str, Any]]:
    """Each comparison that was measured: medians, their ratio (above 1: jspec is faster) and its
    target."""
    rows, found = [], defaultdict(list)
    for figure in figures:
        found[figure.system, figure.what].append(figure)
    for what, peer, target in [*TARGETS, (REPEATED, "jspec, autoregressive", 1.5)]:
        own, other = found["jspec", what], found[peer, what]
        if not own or not other:
            continue
        mine, theirs = (measure.median([figure.value for figure in each]) for each in (own, other))
        ratio = theirs / mine if what.endswith(", s") else mine / theirs
        rows.append({"what": what, "peer": peer, "jspec": mine, "theirs": theirs, "ratio": ratio,
                     "target": target, "jspec_all": [figure.value for figure in own],
                     "theirs_all": [figure.value for figure in other],
                     "jspec_threads": own[-1].threads, "their_threads": other[-1].threads})
        if own[0].answers:
            rows[-1] |= {"jspec_answers": [figure.answers for figure in own],
                         "their_answers": [figure.answers for figure in other]}
    return rows


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['date']}, commit {result['commit']}, {result['machine']['cpu']} "
                        f"x {result['machine']['cores']}, {result['rounds']} rounds")
    for name in ("what", "peer", "jspec", "theirs", "faster by", "target", "met"):
        table.add_column(name, justify="left" if name in ("what", "peer") else "right")
    for row in result["rows"]:
        table.add_row(row["what"], row["peer"], f"{row['jspec']:.1f}", f"{row['theirs']:.1f}",
                      f"{row['ratio']:.2f}x",
                      f"{row['target']:.2f}x", "yes" if row["ratio"] >= row["target"] else "no")
    PlainConsole(width=max(120, PlainConsole().width)).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="?", type=Path,
                        help="where install.sh put the peers, and smollm2 beside them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS,
                        help="default: all, tail_baseline with --baseline")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT",
                        help="of jspec: what tail_baseline times")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one program")
    parser.add_argument("--json", help="write the result there")
    parser.add_argument("--show",
                        help="print the table of a result that was written before, and run nothing")
    args = parser.parse_args(arguments)
    open_results(args)
    if args.show:
        show(json.loads(Path(args.show).read_text()))
        return
    if not args.peers:
        parser.error("where are the peers? see --help")
    args.only = args.only or [name for name in PROGRAMS if args.baseline or name != "tail_baseline"]
    if "tail_baseline" in args.only and not (args.baseline and (args.baseline / "jspec").is_dir()):
        parser.error("tail_baseline needs --baseline, a checkout of jspec")
    args.peers, args.baseline = args.peers.resolve(), args.baseline and args.baseline.resolve()
    figures: list[Figure] = []
    console = PlainConsole(stderr=True)
    for number in range(1, args.rounds + 1):
        args.round = number
        for name in args.only:
            console.print(f"round {number}: {name} (load {os.getloadavg()[0]:.1f})")
            try:
                figures += PROGRAMS[name](args)
            except Failed as error:
                console.print(f"{name} failed: {error}", markup=False)
        result = measure.report(rows_of(figures), rounds=number)
        measure.write_json(args.json, result)
    show(result)


if __name__ == "__main__":
    program(main)
