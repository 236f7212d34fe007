"""How often a draft is accepted, by depth, rule and temperature, on prompts that its training never
saw."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

import jspec
from jspec.answering import batch_on_mesh, decoded
from jspec.draft_config import DraftTrainingConfig
from jspec.drafts import Draft
from jspec.model import Policy
from jspec.output import screen
from jspec.prepare import make_sampling, rollout_layout
from jspec.progress import telling
from jspec.purposes import REPORT_KEY, purpose_key

log = logging.getLogger(__name__)

ROWS = 8
"""Prompts decoded together."""


def report(config: DraftTrainingConfig, policy: Policy, draft: Draft, prompts: list[list[int]],
           directory: Path) -> list[dict[str, Any]]:
    """Measure, print the table, and write `report.json` and, where matplotlib is installed,
    `report.png`."""
    policy = jspec.reshard(policy, rollout_layout(config))
    records = []
    for rule, temperature in itertools.product(config.report.rules, config.report.temperatures):
        with telling(f"measuring acceptance, {rule}, temperature {temperature:g}"):
            records.append(measure(config, policy, draft, prompts, rule, temperature))
    (directory / "report.json").write_text(json.dumps(records, indent=1) + "\n")
    screen().print(table(records))
    try:
        plot(records, directory / "report.png")
    except ImportError:
        log.info("no report.png: it needs matplotlib (pip install matplotlib)")
    return records


def measure(config: DraftTrainingConfig, policy: Policy, draft: Draft, prompts: list[list[int]],
            rule: str, temperature: float) -> dict[str, Any]:
    """Acceptance over all prompts, a record that JSON can hold."""
    sampling = make_sampling(config).replace(temperature=temperature)
    speculation = jspec.Speculation(k=config.report.k, rule=rule)
    totals, key = [], purpose_key(config.seed, REPORT_KEY)
    for at in range(0, len(prompts), ROWS):
        group = prompts[at:at + ROWS]
        # another size would be another compilation: what fills the last batch counts too
        rows = (group * ROWS)[:ROWS]
        batch = batch_on_mesh(rows, policy.layout, group_size=1, seed=jax.random.fold_in(key, at))
        out = decoded(policy, draft, batch, ROWS, sampling=sampling, speculation=speculation)
        totals.append((out.lengths.sum(), out.stats.cycles.sum(), out.stats.accepted,
                       out.stats.drafted))
    tokens, cycles, accepted, drafted = (np.sum(column, axis=0)
                                         for column in zip(*totals, strict=True))
    return {"drafter": draft.name, "rule": rule, "temperature": temperature, "k": config.report.k,
            "prompts": len(prompts), "tokens": int(tokens),
            "acceptance_length": float(tokens / cycles),
            "acceptance_by_position": (accepted / np.maximum(drafted, 1)).tolist()}


def table(records: list[dict[str, Any]]) -> Table:
    """Tokens a cycle and the share of drafts accepted at every depth."""
    made = Table(title=f"{records[0]['drafter']}, k = {records[0]['k']}, {records[0]['prompts']} "
                 "prompts not seen")
    depths = [f"depth {i + 1}" for i in range(records[0]["k"])]
    for name in ("rule", "temperature", "tokens a cycle", *depths):
        made.add_column(name, justify="left" if name == "rule" else "right")
    for record in records:
        made.add_row(record["rule"], f"{record['temperature']:g}",
                     f"{record['acceptance_length']:.2f}",
                     *(f"{share:.0%}" for share in record["acceptance_by_position"]))
    return made


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Acceptance by depth, a line for each rule and temperature. Raises ImportError without
    matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for record in records:
        shares = record["acceptance_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=f"{record['rule']}, T = "
                  f"{record['temperature']:g}: {record['acceptance_length']:.2f} tokens a cycle")
    axes.set(xlabel="depth", ylabel="drafts accepted", ylim=(0, 1),
             xticks=range(1, records[0]["k"] + 1), title=f"{records[0]['drafter']}, "
             f"{records[0]['prompts']} prompts that training never saw")
    axes.legend()
    figure.savefig(path, dpi=120)
