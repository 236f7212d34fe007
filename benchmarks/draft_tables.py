"""The documents' tables about drafts, each a function of `results/`; `tables.py` writes them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.table_text import Row, link, markdown, result, times

DRAFTS = {"mtp": "`mtp`, the head that ships", "self": "`self`, 8 bits",
          "self:bits=4": "`self`, 4 bits", "suffix": "`suffix`", "ngram": "`ngram`"}


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


def small_batches(name: str = "drafts_small_cpu") -> str:
    """A trained head at small batches, and what verification costs of that."""
    rows = result(name)
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


def trained_equally() -> str:
    """Drafters after the same seconds of training on the same samples."""
    rows = result("trained_equally_cpu")["rows"]

    def line(draft: str) -> list[str]:
        mine = [row for row in rows if row["draft"] == draft]
        ends = [max((row for row in mine if row["seed"] == seed), key=lambda row: row["seconds"])
                for seed in sorted({row["seed"] for row in mine})]
        lengths = [row["acceptance_length"] for row in ends]
        first, second = (statistics.mean(row["overlap_by_depth"][at] for row in ends)
                         for at in (0, 1))
        return [f"`{draft}`", " ".join(str(row["steps"]) for row in ends),
                " ".join(f"{x:.2f}" for x in lengths), f"{statistics.mean(lengths):.3f}",
                f"{first:.0%}", f"{second:.0%}"]

    return markdown(["draft", "steps, by seed", "tokens a cycle at k = 7, by seed", "mean",
                     "first accepted", "second, if the first was"],
                    [line(draft) for draft in dict.fromkeys(row["draft"] for row in rows)])


def equal_runs() -> str:
    """A run with drafts and the same one without."""
    found = result("equal_runs_cpu")
    pairs = [row["rollout_seconds"] for row in found["rows"] if not row["compiled"]]
    drafted, plain = (statistics.median(pair[at] for pair in pairs) for at in (0, 1))
    return markdown(["steps", "with the same answers and rewards", "a rollout, drafted / plain",
                     "all rollouts", "whole steps"],
                    [[str(found["steps"]), str(found["same"]), f"{drafted:.2f} / {plain:.2f} s",
                      times(found["rollout_speedup"]), times(found["step_speedup"])]])


AUTO = {"tail_after_six_cpu": "the quickstart's task, after its six steps",
        "tail_8_rows_cpu": "held-out prompts, answers of up to 512 tokens",
        "tail_32_rows_cpu": "the same, four times as many"}


def auto() -> str:
    """What `auto` chose for the trained head, and tokens a second with it over those without."""
    def line(name: str) -> list[str]:
        found = result(name)
        by_k = {k: [row for row in found["rows"] if row["k"] == k] for k in (0, "auto")}
        speeds = [sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
                  for rows in by_k.values()]
        return [AUTO[name], str(found["prompts"] * found["samples"]),
                " ".join(map(str, by_k["auto"][0]["loop_k"])),
                " / ".join(f"{speed:.1f}" for speed in speeds), times(speeds[1] / speeds[0]),
                link(name)]

    return markdown(["workload", "rows", "k of each loop", "tok/s, no draft / `auto`", "speed-up",
                     "data"], map(line, AUTO))
