"""What `jspec bench drafts` makes of its records: tok/s and speed-ups, a table, a picture."""

from collections import defaultdict
from typing import Any

from rich.table import Table

from benchmarks import measure
from benchmarks.options import PLAIN
from jspec.output import Output, screen


def parts_sum_ms(record: dict[str, Any]) -> float:
    """A cycle as the sum of its parts."""
    return record["draft_ms"] + record["verify_ms"] + record["accept_ms"]


def compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of one batch size with tok/s, the cycle, what remains of it, and both speed-ups
    over `none`."""
    plain = {record["temperature"]: record for record in records if record["draft"] == PLAIN}

    def speed(record: dict[str, Any]) -> float:
        return record["tokens"] / measure.median(record["seconds"])

    def add(record: dict[str, Any]) -> dict[str, Any]:
        base = plain[record["temperature"]]
        cycle_ms = (1e3 * (measure.median(record["seconds"]) - record["prefill_s"])
                    / record["cycles"])
        return {**record, "tok_per_s": speed(record), "cycle_ms": cycle_ms,
                "rest_ms": cycle_ms - record["draft_ms"] - record["verify_ms"],
                "speedup": speed(record) / speed(base),
                "predicted_speedup": record["acceptance_length"] * parts_sum_ms(base)
                / parts_sum_ms(record)}

    return [add(record) for record in records]


def show(records: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for name in ("draft", "k", "batch", "T", "rule", "tokens/cycle", "accepted by position",
                 "cycle ms", "draft ms", "verify ms", "rest ms", "tok/s", "speed-up", "predicted"):
        table.add_column(name, justify="left" if name in ("draft", "rule", "accepted by position")
                         else "right", overflow="fold")
    for r in records:
        table.add_row(r["draft"], str(r["k"]), str(r["batch"]), f"{r['temperature']:g}", r["rule"],
                      f"{r['acceptance_length']:.2f}",
                      " ".join(f"{a:.2f}" for a in r["acceptance_by_position"]),
                      *(f"{r[name]:.2f}" for name in ("cycle_ms", "draft_ms", "verify_ms",
                                                      "rest_ms")), f"{r['tok_per_s']:.1f}",
                      f"{r['speedup']:.2f}x", f"{r['predicted_speedup']:.2f}x")
    screen(width=max(150, screen().width)).print(table)


def draw(records: list[dict[str, Any]], title: str, written: Output) -> None:
    """A row of three panels for each batch, temperature and rule: tokens a cycle and speed-up
    (measured; dashed: predicted) over k, and acceptance by position at the largest k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = defaultdict(list)
    for r in (r for r in records if r["k"]):
        settings[r["batch"], r["temperature"], r["rule"]].append(r)
    figure, rows = plt.subplots(max(1, len(settings)), 3, figsize=(14, 3.8 * max(1, len(settings))),
                                squeeze=False, constrained_layout=True)
    names = dict.fromkeys(r["draft"] for r in records if r["k"])
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for axes, ((batch, temperature, rule), group) in zip(rows, settings.items(), strict=False):
        for name in dict.fromkeys(r["draft"] for r in group):
            mine = sorted((r for r in group if r["draft"] == name), key=lambda r: r["k"])
            ks, style = [r["k"] for r in mine], {"color": colors[name], "marker": "o"}
            axes[0].plot(ks, [r["acceptance_length"] for r in mine], label=name, **style)
            axes[1].plot(ks, [r["speedup"] for r in mine], label=name, **style)
            axes[1].plot(ks, [r["predicted_speedup"] for r in mine], linestyle="--",
                         markerfacecolor="white", **style)
            axes[2].plot(range(1, ks[-1] + 1), mine[-1]["acceptance_by_position"],
                         label=f"{name}, k = {ks[-1]}", **style)
        where = f"batch {batch}, T = {temperature:g}, {rule}"
        for axis, what, label in zip(axes, ("tokens a cycle", "speed-up (dashed: predicted)",
                                            "accepted, by position"),
                                     ("k", "k", "draft position"), strict=True):
            axis.set_title(f"{what}; {where}", fontsize=10)
            ticks = ({r["k"] for r in group} if label == "k"
                     else range(1, max(r["k"] for r in group) + 1))
            axis.set(xlabel=label, xticks=sorted(ticks))
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        axes[1].axhline(1, color="0.5", linewidth=1)
        axes[2].set_ylim(0, 1.02)
    figure.suptitle(title)
    written.save(figure)
    plt.close(figure)
