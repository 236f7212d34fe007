"""Writes the documents' tables from `benchmarks/results/*.json`, each between its two markers.

    python -m benchmarks.tables             writes them
    python -m benchmarks.tables --check     writes nothing; exit code 1 where a document differs

A document holds a table as `<!-- table NAME -->`, the table, `<!-- end -->`. Figures in the text
around the tables are the author's to keep true. Nothing here needs JAX.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import draft_tables
from benchmarks.table_text import RESULTS, ROOT, Row, link, markdown, result, times

DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/configuration.md", "docs/drafts.md",
             "docs/kernels.md")
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PEERS = {"vllm": "vLLM (CPU build)", "tunix": "Tunix"}
KIB, MIB, GB = 2**10, 2**20, 1e9


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


# --- objectives ---


def objectives() -> str:
    """The tiny run under each objective."""
    return markdown(["objective", "mean reward of the last 10 steps", "above 0.8 from step", "s"],
                    [[f"`{row['objective']}`", f"{row['last']:.3f}", str(row["above_four_fifths"]),
                      f"{row['seconds']:.0f}"] for row in result("objectives_cpu")["rows"]])


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
    "drafts": draft_tables.drafts,
    "best_drafts": draft_tables.best_drafts,
    "small_batches": draft_tables.small_batches,
    "after_six": lambda: draft_tables.small_batches("drafts_after_six_cpu"),
    "trained_equally": draft_tables.trained_equally,
    "equal_runs": draft_tables.equal_runs,
    "auto": draft_tables.auto,
    "online": draft_tables.online,
    "served": draft_tables.served,
    "losses": draft_tables.losses,
    "objectives": objectives,
    "shares": draft_tables.shares,
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
