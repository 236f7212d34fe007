"""Writes the documents' tables from `benchmarks/results/*.json`, each between its two markers.

    python -m benchmarks.tables             writes them
    python -m benchmarks.tables --check     writes nothing; exit code 1 where a document differs

A document holds a table as `<!-- table NAME -->`, the table, `<!-- end -->`. Figures in the text
around the tables are the author's to keep true. Nothing here needs JAX.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/configuration.md", "docs/drafts.md",
             "docs/kernels.md")
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PEERS = {"vllm": "vLLM (CPU build)", "tunix": "Tunix"}
DRAFTS = {"mtp": "`mtp`, the head that ships", "self": "`self`, 8 bits",
          "self:bits=4": "`self`, 4 bits", "suffix": "`suffix`", "ngram": "`ngram`"}
KIB, MIB, GB = 2**10, 2**20, 1e9

Row = Mapping[str, Any]


def result(name: str) -> Any:
    """What `benchmarks/results/NAME.json` says."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, ending with a line end."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def link(name: str, folder: str = "../benchmarks/results") -> str:
    """To the file that a figure is from."""
    return f"[`{name}.json`]({folder}/{name}.json)"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


# --- against others ---


def versus(name: str, keep: Callable[[Row], bool] = lambda row: True) -> str:
    """The rows of a result of `versus.py`, with the targets that were set beforehand."""
    run = result(name)
    peers = PEERS | {"baseline": f"jspec at {run.get('baseline')}"}

    def line(row: Row) -> list[str]:
        what, _, unit = row["what"].rpartition(", ")
        what += ", `k: auto`" * (what == "heavy tail")
        other = f"{peers.get(row['peer'], row['peer'])}: {row['theirs']:.1f} {unit}"
        met = "yes" if row["ratio"] >= row["target"] else "no"
        return [what, f"{row['jspec']:.1f} {unit}", other, times(row["ratio"]),
                times(row["target"]), met]

    return markdown(["what", "jspec", "the other", "faster by", "target", "met"],
                    [line(row) for row in run["rows"] if keep(row)])


def tail_answers() -> str:
    """How long the answers of the heavy tail were: samplers draw differently."""
    ours, *_ = result("tail_cpu")["rows"]

    def line(name: str, answers: Row) -> list[str]:
        return [name, f"{answers['tokens']:,}", f"{answers['mean']:.0f}",
                f"{answers['median']:g}", str(answers["largest"]), f"{answers['seconds']:.1f}"]

    return markdown(["answers", "tokens", "mean", "median", "longest", "seconds"],
                    [line("jspec", ours["jspec_answers"][0]),
                     line("vLLM", ours["their_answers"][0])])


def slots() -> str:
    """The heavy tail with fewer rows in flight, without a draft."""
    return markdown(["slots", "tok/s", "occupancy", "tokens", "seconds"],
                    [[str(row["slots"]), f"{row['tok_per_s']:.1f}", f"{row['occupancy']:.2f}",
                      f"{row['tokens']:,}", f"{row['seconds']:.1f}"]
                     for row in result("tail_slots_cpu")["rows"]])


def readme() -> str:
    """Three figures; the first is of what takes most of a step, whatever it says."""
    def row(name: str, what: str, peer: str) -> Row:
        rows = result(name)["rows"]
        return next(row for row in rows if row["what"].startswith(what) and row["peer"] == peer)

    def line(what: str, ours: str, theirs: str, ratio: float, name: str) -> list[str]:
        faster = times(ratio) + " (slower)" * (ratio < 1)
        return [what, ours, theirs, faster, link(name, "benchmarks/results")]

    tail = row("tail_cpu", "heavy tail, tok", "vllm")
    step = row("tail_grpo_cpu", "heavy tail, GRPO step", "tunix")
    first, *_, last = result("online_cpu")["rows"]
    learning, frozen = (last[name]["acceptance_length"] for name in ("online", "frozen"))
    return markdown(["what", "jspec", "the other", "faster by", "data"], [
        line("rollout, 32 answers that end by themselves, up to 512 tokens",
             f"{tail['jspec']:.0f} tok/s", f"vLLM {tail['theirs']:.0f} tok/s", tail["ratio"],
             "tail_cpu"),
        line("whole GRPO step with such answers", f"{step['jspec']:.0f} tok/s",
             f"Tunix {step['theirs']:.0f} tok/s", step["ratio"], "tail_grpo_cpu"),
        line(f"tokens a cycle at step {last['step']} of `configs/tiny.yaml`, the draft learning",
             f"{learning:.2f}", f"{frozen:.2f}, frozen at step {first['step']}",
             learning / frozen, "online_cpu"),
    ])


# --- drafts ---


def measured_in(draft: str) -> str:
    """The result that a drafter is in: the rounding of 4 bits has changed since the first."""
    return "drafts_self_cpu" if draft == "self:bits=4" else "drafts_cpu"


def of_draft(draft: str) -> list[Row]:
    return [row for row in result(measured_in(draft)) if row["draft"] == draft]


def best(rows: Sequence[Row], batch: int, field: str, unit: str = "") -> str:
    """The largest value of a field at temperature 1, and at 0."""
    values = [[row[field] for row in rows if row["batch"] == batch and row["temperature"] == t]
              for t in (1.0, 0.0)]
    return " / ".join(f"{max(of_temperature):.2f}{unit}" for of_temperature in values)


def drafts() -> str:
    """Every drafter at every k."""
    def line(draft: str, k: int) -> list[str]:
        rows = [row for row in of_draft(draft) if row["k"] == k]
        return [DRAFTS[draft], str(k), best(rows, 1, "acceptance_length"),
                best(rows, 1, "speedup", "x"), best(rows, 8, "speedup", "x")]

    return markdown(["draft", "k", "tokens a cycle, T = 1 / 0", "batch 1, T = 1 / 0",
                     "batch 8, T = 1 / 0"], [line(draft, k) for draft in DRAFTS for k in (1, 2, 3)])


def best_drafts() -> str:
    """Every drafter at its best k."""
    return markdown(["draft, at its best k", "batch 1, T = 1 / 0", "batch 8, T = 1 / 0", "data"],
                    [[name, best(of_draft(draft), 1, "speedup", "x"),
                      best(of_draft(draft), 8, "speedup", "x"), link(measured_in(draft))]
                     for draft, name in DRAFTS.items()])


def small_batches() -> str:
    """The shipped head at small batches, and what verification costs of that."""
    rows = result("drafts_small_cpu")
    plain = {row["batch"]: row for row in rows if not row["k"]}

    def line(row: Row) -> list[str]:
        step = plain[row["batch"]]
        promised = row["acceptance_length"] / (1 + row["draft_ms"] / step["cycle_ms"])
        return [str(row["batch"]), str(row["k"]), f"{row['acceptance_length']:.2f}",
                times(row["verify_ms"] / step["verify_ms"]),
                times(row["draft_ms"] / step["cycle_ms"]), times(row["speedup"]), times(promised)]

    return markdown(["batch", "k", "tokens a cycle", "a verification, in plain ones",
                     "drafting, in plain steps", "speed-up", "if verification cost a plain step"],
                    [line(row) for row in rows if row["k"]])


def online() -> str:
    """A draft that learns beside its policy, and the same one frozen, on the same policies."""
    def line(row: Row) -> list[str]:
        lengths = (row[name]["acceptance_length"] for name in ("online", "frozen"))
        return [str(row["step"]), f"{row['reward']:.2f}", *(f"{x:.2f}" for x in lengths)]

    return markdown(["step", "reward", "tokens a cycle, learning", "tokens a cycle, frozen"],
                    map(line, result("online_cpu")["rows"]))


def objectives() -> str:
    """The tiny run under each objective."""
    return markdown(["objective", "mean reward of the last 10 steps", "above 0.8 from step", "s"],
                    [[f"`{row['objective']}`", f"{row['last']:.3f}", str(row["above_four_fifths"]),
                      f"{row['seconds']:.0f}"] for row in result("objectives_cpu")["rows"]])


def losses() -> str:
    """The draft's losses, from a trained head and from random initialisation: means over seeds."""
    trained = result("draft_losses_cpu")["rows"]
    scratch = result("draft_losses_scratch_cpu")["rows"]

    def line(loss: str) -> list[str]:
        after = [row["acceptance_length"] for row in trained if row["loss"] == loss]
        ends = [row["acceptance_length_by_20_steps"][-1] for row in scratch if row["loss"] == loss]
        return [f"`{loss}`", f"{statistics.mean(after):.3f}", f"{statistics.mean(ends):.2f}"]

    start = next(row["acceptance_length"] for row in trained if not row["steps"])
    return markdown(["`draft.loss`", "24 steps from a trained SmolLM2 head",
                     "the tiny run, from scratch"],
                    [["before", f"{start:.3f}", ""], *map(line, ("kl", "tv", "overlap"))])


def shares() -> str:
    """How much of the update the draft's training is."""
    return markdown(["command", "the draft's share of the update"],
                    [[f"`{row['command']}`", f"{row['draft_share_of_update']:.1%}"]
                     for row in result("draft_share_cpu")["rows"]])


def served() -> str:
    """The kinds that vLLM ran: text and acceptance there and here."""
    def line(row: Row) -> list[str]:
        there, here = row["vllm"], row["jspec"]
        accepted = (" ".join(f"{x:.0%}" for x in side["acceptance_by_position"])
                    for side in (there, here))
        return [row["draft"], *(f"{row['same_text'][what]} of {row['prompts']}"
                                for what in ("vllm_alone", "jspec")),
                f"{row['same_cycles']} of {row['rows_compared']}",
                f"{row['replayed']} of {row['prompts']}" if "replayed" in row else "",
                f"{there['acceptance_length']:.2f} / {here['acceptance_length']:.2f}",
                " / ".join(accepted)]

    return markdown(["draft", "answers as vLLM's without it", "as jspec's with it",
                     "of these, all cycles the same", "replayed", "tokens a cycle, vLLM / jspec",
                     "accepted by position, vLLM / jspec"],
                    map(line, result("served_cpu")))


# --- what compiled ---


def most(rows: Iterable[Row], field: str) -> int:
    return max(row[field] for row in rows if row.get(field) is not None)


def kernels() -> str:
    """The most that the kernels take, of all their real shapes."""
    rows = result("compile")["rows"]

    def line(kernel: str, dtype: str) -> list[str]:
        mine = [row for row in rows if row["what"] == kernel and dtype in row["shape"]]
        gpu = [row for row in mine if row["chip"] == "sm_90"]
        vector, shared = most(mine, "vmem_bytes") / MIB, most(mine, "smem_bytes") / KIB
        return [f"`{kernel}`, {dtype}", str(len(gpu)), f"{vector:.1f} MiB", f"{shared:.0f} KiB",
                str(most(gpu, "registers")), f"{most(gpu, 'spill_bytes')} bytes"]

    chips = ", ".join(dict.fromkeys(row["chip"] for row in rows if row["chip"] != "sm_90"))
    return markdown(["kernel", "shapes and rules", f"vector memory ({chips})",
                     "shared memory (sm_90)", "registers (sm_90)", "spilled (sm_90)"],
                    [line(kernel, dtype) for kernel in ("rejection_sampling", "verify_attention")
                     for dtype in ("bfloat16", "float32")])


def rollouts() -> str:
    """What `jspec.rollout` takes beside the weights, on chips that were not there."""
    def line(row: Row) -> list[str]:
        pool = f", `kv_tokens` {row['kv_tokens']:,}" if row["kv_tokens"] else ""
        axes = (f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        return [row["shape"], f"`{row['draft']}`{pool}", row["chip"],
                " x ".join(axes) or "one device", f"{row['temp_bytes'] / GB:.1f} GB"]

    rows = [row for row in result("compile")["rows"] if row["what"] == "jspec.rollout"]
    return markdown(["model", "draft", "chip", "mesh", "memory of a device, beside the weights"],
                    map(line, sorted(rows, key=lambda row: row["shape"] != "qwen3-8b")))


# --- the files ---


def files() -> str:
    """Every result with the command, the commit and the day that it is from."""
    def lines(path: Path) -> list[list[str]]:
        found = result(path.stem)
        runs = {run["command"]: run for run in (found if isinstance(found, list) else [found])}
        return [[link(path.stem), f"`{without_folders(command)}`", run["commit"], run["date"][:10]]
                for command, run in runs.items()]

    return markdown(["file", "command", "commit", "day"],
                    [line for path in sorted(RESULTS.glob("*.json")) for line in lines(path)])


def without_folders(command: str) -> str:
    """A command with the names of files alone, wherever they lay on the machine that ran it."""
    return re.sub(r"(?<![^\s=])/(?:[\w.-]+/)*(?=[\w.-])", "", command)


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "tail": lambda: versus("tail_cpu"),
    "tail_answers": tail_answers,
    "tail_grpo": lambda: versus("tail_grpo_cpu"),
    "slots": slots,
    "equal": lambda: versus("equal_cpu"),
    # vLLM's figures of that day are disputed by vllm_cpu.json; those of equal_cpu.json stand
    "tunix": lambda: versus("cpu", lambda row: row["peer"] == "tunix"),
    "repeat": lambda: versus("repeat_cpu"),
    "drafts": drafts,
    "best_drafts": best_drafts,
    "small_batches": small_batches,
    "online": online,
    "served": served,
    "losses": losses,
    "objectives": objectives,
    "shares": shares,
    "kernels": kernels,
    "rollouts": rollouts,
    "files": files,
}


def filled(text: str) -> str:
    """A document with its tables as the results make them.

    Raises KeyError for a table that nothing here makes.
    """
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where --check finds a document that differs, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit code 1 where a document differs")
    check, differing = parser.parse_args(arguments).check, []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            differing.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    print(f"{'differing' if check else 'written'}: {', '.join(differing) or 'none'}")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
