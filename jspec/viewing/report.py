"""`jspec report`: all of a run on one page of HTML, which asks no network for anything."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jspec.clock import PHASES
from jspec.errors import InputError
from jspec.output import open_output, screen
from jspec.run_files import METRICS, Sample, read_records, read_samples, steps_with_samples
from jspec.setting_values import shown
from jspec.viewing.charts import lines, number, stacked
from jspec.viewing.samples import rewards_by_name, visible, whole_run
from jspec.viewing.style import STYLE

SAMPLES = 40
"""Answers that the page shows at most: of the first step, of those between, and of the last."""

Records = Sequence[dict[str, Any]]
Scores = dict[str, list[tuple[float, float]]]


def report(arguments: argparse.Namespace) -> int:
    """`jspec report`: writes the page."""
    run = whole_run(arguments.source)
    records = read_records(run / METRICS)
    if not records:
        raise InputError(f"{run} is not the output_dir of a run that has done a step: it has no "
                         f"records in {METRICS}")
    target = arguments.html or str(run / "report.html")
    written = open_output(target, "--html")
    written.write(page(run, records))
    screen().print(target, soft_wrap=True)
    return 0


def page(run: Path, records: Records) -> str:
    """The page of a run, as text."""
    title = f"jspec: {run.resolve().name}"
    parts = [f"<h1>{text(run.resolve().name)}</h1>", f"<p>{text(summary(records))}</p>",
             tiles(records), charts(records), changes(run), samples(run), configuration(run)]
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
            + "\n".join(part for part in parts if part) + "\n</main></body></html>\n")


def text(value: Any) -> str:
    """What may be anybody's, as text of a page."""
    return escape(visible(str(value)))


def summary(records: Records) -> str:
    steps = [record for record in records if record["step"]]
    seconds = sum(record.get("seconds/step") or 0.0 for record in records)
    took = f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"
    return (f"{len(steps)} steps, the last one written {records[-1].get('time', '?')}; {took} in "
            "steps, compiling included.")


def series(records: Records, name: str) -> list[tuple[float, float]]:
    """(step, value) of a field wherever it is a number."""
    found = ((record["step"], record.get(name)) for record in records)
    return [(step, float(value)) for step, value in found
            if isinstance(value, int | float) and math.isfinite(value)]


def tiles(records: Records) -> str:
    """The run's last numbers, in large."""
    last = {name: series(records, name) for name in (
        "reward", "length", "finished", "tokens_per_second", "acceptance_length", "acceptance",
        "logprob_gap")}
    labels = {"reward": "reward", "length": "tokens an answer", "finished": "finished",
              "tokens_per_second": "tokens a second", "acceptance_length": "tokens a cycle",
              "acceptance": "drafts accepted", "logprob_gap": "logprob gap"}
    shown = [(labels[name], points) for name, points in last.items() if points]
    if seconds := [y for _, y in series(records, "seconds/step")]:
        shown.append(("seconds a step (median)", [(0, statistics.median(seconds))]))
    return '<section class="tiles">' + "".join(
        f"<div><b>{number(points[-1][1])}</b><span>{text(label)}</span></div>"
        for label, points in shown) + "</section>"


def charts(records: Records) -> str:
    spread = [(record["step"], record["reward"] - record["reward_std"],
               record["reward"] + record["reward_std"]) for record in records
              if all(isinstance(record.get(name), float) for name in ("reward", "reward_std"))]

    def named(prefix: str) -> Scores:
        names = sorted({name for record in records for name in record if name.startswith(prefix)})
        return {name.removeprefix(prefix): series(records, name) for name in names}

    def by_prompts(field: str) -> Scores:
        return {name.removesuffix(f"/{field}"): points for name, points in
                named("source/").items() if name.endswith(f"/{field}")}

    of_all, by_source = evaluations(named("eval/"))
    drawn = [
        lines("Reward, and its deviation over the step's answers",
              {"reward": series(records, "reward")}, spread),
        lines("Rewards by name", named("reward/"), named=True),
        lines("Reward by source", by_prompts("reward"), named=True),
        stacked("How hard the prompts are, in shares of them",
                {name: series(records, f"curriculum/{name}") for name in
                 ("never", "hard", "middling", "easy", "always", "unseen")}),
        lines("Evaluation", of_all, named=True),
        *(lines(f"Evaluation of {name}", scores, named=True)
          for name, scores in by_source.items()),
        lines("Tokens an answer", {name: series(records, name)
                                   for name in ("length", "length_dropped")}),
        lines("Tokens an answer, by source", by_prompts("length"), named=True),
        lines("Shares", {name: series(records, name)
                         for name in ("finished", "reward_differs", "acceptance")}),
        lines("Tokens a cycle", {"tokens a cycle": series(records, "acceptance_length")}),
        lines("Tokens a second, of rollouts that compiled nothing",
              {"tokens/s": series(records, "tokens_per_second")}),
        stacked("Seconds of a step, by phase", phases(records)),
        lines("Gap between the verifier's log-probabilities and the update's, in nats",
              {"largest": series(records, "logprob_gap"),
               "mean": series(records, "logprob_gap_mean")}, log=True),
        lines("Entropy, in nats", {"entropy": series(records, "entropy")}),
        lines("KL to the reference, in nats", {"kl": series(records, "kl")}),
        lines("Clipped tokens", {name.strip("/") or "all": points
                                 for name, points in named("clip_fraction").items()}),
        lines("Norm of the gradient, before the clip", {"grad_norm": series(records, "grad_norm")},
              log=True),
        lines("Loss of the draft", {"draft/loss": series(records, "draft/loss")}),
    ]
    return '<section class="charts">' + "".join(drawn) + "</section>"


def evaluations(found: Scores) -> tuple[Scores, dict[str, Scores]]:
    """What `eval/` fields say of all prompts, and of each of several sources."""
    of_all: Scores = {}
    by_source: dict[str, Scores] = {}
    for name, points in found.items():
        source, _, score = name.rpartition("/")
        if "@" in score and source:
            by_source.setdefault(source, {})[score] = points
        elif "@" in score or source == "reward":
            of_all[name] = points
    return of_all, by_source


def phases(records: Records) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each phase at each step, those of compiling left out where that is known."""
    steps = [record for record in records if record["step"]]
    warm = [record for record in steps if not record.get("seconds/compile")] or steps
    return {phase: [(record["step"], record.get(f"seconds/{phase}") or 0.0) for record in warm]
            for phase in (*PHASES, "evaluation")}


def changes(run: Path) -> str:
    """With what other settings the run went on."""
    file = run / "changes.jsonl"
    try:
        found = [json.loads(line) for line in file.read_text().splitlines()]
        items = "".join(f"<li>after step {text(change['step'])}: " + text(", ".join(
            f"{key} from {shown(was)} to {shown(now)}"
            for key, (was, now) in change["changed"].items())) + "</li>" for change in found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""  # it is not as a run writes it
    return f"<h2>What was changed on the way</h2><ul>{items}</ul>" if items else ""


def samples(run: Path) -> str:
    """Some answers, newest first."""
    steps = steps_with_samples(run)
    if not steps:
        return ""
    few = 4
    asked = sorted({steps[round(i * (len(steps) - 1) / max(few - 1, 1))] for i in range(few)},
                   reverse=True)
    rows = [row for step in asked for row in read_samples(run, step)[:SAMPLES // few]]
    several = any(row.get("source") for row in rows)
    head = "".join(f"<th>{name}</th>" for name in (
        "step", *["source"] * several, "reward", "tokens", "accepted", "prompt", "answer",
        "response"))
    return ("<h2>Samples</h2><p>Of some steps; <code>jspec inspect</code> pages through them all."
            '</p><div class="wide"><table><thead><tr>' + head + "</tr></thead><tbody>"
            + "".join(sample_row(row, several) for row in rows) + "</tbody></table></div>")


def sample_row(sample: Sample, several: bool) -> str:
    """several: the table says of which source each is."""
    by_name = rewards_by_name(sample)
    failed = " (not graded)" if sample.get("failed") else ""
    cut = "" if sample.get("finished") else " (cut off)"
    reward = number(sample.get("reward") or 0.0)
    cells = (f"<td>{sample['step']}</td>",
             *[f"<td>{text(sample.get('source') or '')}</td>"] * several,
             f"<td><b>{reward}</b>{failed}{f'<br>{text(by_name)}' if by_name else ''}</td>",
             f"<td>{text(sample.get('length'))}{cut}</td>", f"<td>{text(sample.get('accepted'))}"
             "</td>", *(f'<td class="text">{text(sample.get(part, ""))}</td>'
                        for part in ("prompt", "answer", "response")))
    return f"<tr>{''.join(cells)}</tr>"


def configuration(run: Path) -> str:
    try:
        config = (run / "config.yaml").read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    return f"<details><summary>Configuration</summary><pre>{text(config)}</pre></details>"
