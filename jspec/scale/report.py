"""What `jspec fit` says: tables, bars of memory, JSON, and the bars as an SVG."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import textwrap
from typing import Any
from xml.sax.saxutils import escape

import jax
from rich.console import Console
from rich.table import Table

from jspec.profiling import SCOPES, loop_name
from jspec.scale.chips import GIB
from jspec.scale.depths import kinds
from jspec.scale.fit import Fit, Program
from jspec.scale.floors import Floor

COLOURS = {
    "master weights": "#4e79a7",
    "optimizer": "#76b7b2",
    "reference": "#b07aa1",
    "rollout copy": "#f28e2b",
    "KV pool": "#e15759",
    "draft": "#edc948",
    "prompts and answers": "#9c755f",
    "temporaries": "#bab0ac",
}
LETTERS = dict(zip(COLOURS, "WORCKDAT", strict=True))
WIDTH = 60


def versions(fit: Fit) -> str:
    """Of what compiled."""
    found = [("jax", jax.__version__)]
    package = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}.get(fit.topology.chip.platform)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found += [(package, importlib.metadata.version(package))] if package else []
    return ", ".join(f"{name} {version}" for name, version in found)


def verdict(fit: Fit) -> str:
    """In one line, whether it fits."""
    chip, program = fit.topology.chip, fit.tightest
    room = chip.granted_bytes / GIB
    if fit.left >= 0:
        return (
            f"{fit.config.model.name} fits {fit.topology.name}: the {program.name}, the tightest, "
            f"takes "
            f"{program.needed / GIB:.1f} of {room:.1f} GiB a device, {fit.left / GIB:.1f} are left"
        )
    return (
        f"{fit.config.model.name} does not fit {fit.topology.name}: the {program.name} needs "
        f"{program.needed / GIB:.1f} GiB a device, {-fit.left / GIB:.1f} more than the {room:.1f} "
        "there are"
    )


def compiled_how(fit: Fit) -> str:
    """In one line, what was compiled, of how many layers, by what."""
    parts = []
    for program in fit.programs:
        few = program.layers != (fit.model.num_layers,)
        layers = f"at {' and '.join(map(str, program.layers))} layers" if few else "at full depth"
        parts.append(f"{program.name} {layers}{', refused' if program.refused else ''}")
    dense, sparse = kinds(fit.model)
    layers = (
        f"{dense} dense layers" * bool(dense)
        + " and " * bool(dense and sparse)
        + f"{sparse} sparse" * bool(sparse)
    )
    return (
        f"Compiled: {'; '.join(parts)}; what is not at full depth goes on in a straight line "
        f"({layers}). "
        f"{versions(fit)}, {sum(program.seconds for program in fit.programs):.0f} s of compiling."
    )


def workload(fit: Fit) -> str:
    """In one line, of what the floors are."""
    data = fit.config.data
    mesh = " x ".join(f"{name} {size}" for name, size in fit.mesh.items())
    k = (
        fit.k
        if isinstance(fit.k, int)
        else ", ".join(f"{k} with up to {rows} rows" for rows, k in fit.k)
    )
    return (
        f"{fit.topology.count} devices, {mesh}; {data.prompts_drawn} prompts of "
        f"{data.max_prompt_tokens} tokens x "
        f"{data.group_size} answers of {fit.length}; draft {fit.config.draft.name}, k = {k}, "
        f"{fit.accepted:g} tokens a cycle: {fit.cycles} cycles; "
        f"{fit.micro_batch[1]} micro-batches of "
        f"{fit.micro_batch[0]} rows"
    )


def most(fit: Fit) -> str:
    """In one line, how much more would fit."""
    largest, data = fit.largest, fit.config.data
    rows = data.prompts_drawn * data.group_size
    tokens = (
        "all that its slots can need" if largest.kv_tokens is None else f"{largest.kv_tokens:,}"
    )
    return (
        f"Largest that fit, by sums and not compiled: rollout.slots {largest.slots} "
        f"(of {rows} rows), "
        f"rollout.kv_tokens {tokens}, grpo.micro_batch {largest.micro_batch}."
    )


def host(fit: Fit) -> str:
    """In one line, what a host holds."""
    chip, total = fit.topology.chip, sum(fit.host_bytes.values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in fit.host_bytes.items())
    room = chip.host_bytes * chip.devices_a_host / GIB
    within = "within" if total / GIB < room else "MORE THAN"
    return f"Host memory: {parts} GiB, {within} the {room:.0f} GiB of a host."


def memory_table(fit: Fit) -> Table:
    """Bytes a device by kind, program by program."""
    table = Table(
        "GiB a device", *(program.name for program in fit.programs), title="memory, by kind"
    )
    for kind in COLOURS:
        sizes = [program.kinds.get(kind, 0) for program in fit.programs]
        if any(sizes):
            table.add_row(kind, *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    table.add_row("all", *(f"{program.needed / GIB:.2f}" for program in fit.programs), style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def bars(fit: Fit) -> list[str]:
    """A bar for each program, a letter a kind, and | where the chip's memory ends."""
    room = fit.topology.chip.granted_bytes
    scale = WIDTH / max(room, *(program.needed for program in fit.programs))
    lines = []
    for program in fit.programs:
        bar, done = "", 0.0
        for kind, size in shown(program).items():
            done += size
            bar += LETTERS[kind] * (round(done * scale) - len(bar))
        end = round(room * scale)
        bar = bar.ljust(end)
        lines.append(f"{program.name:>9} {bar[:end]}|{bar[end:]}")
    used = [kind for kind in COLOURS if any(program.kinds.get(kind) for program in fit.programs)]
    return [*lines, " " * 10 + ", ".join(f"{LETTERS[kind]} {kind}" for kind in used)]


def shown(program: Program) -> dict[str, int]:
    """Its kinds in the order of the picture."""
    return {kind: program.kinds[kind] for kind in COLOURS if program.kinds.get(kind)}


def floor_table(fit: Fit) -> Table:
    """The least that each phase can take."""
    table = Table(
        "phase",
        "of",
        "operations",
        "memory",
        "ICI",
        "DCN",
        "floor, s",
        "binds",
        title="the least it can take, seconds (floors; expect 1.2 to 2 times that)",
    )

    def row(name: str, of: str, floor: Floor, **style: Any) -> None:
        table.add_row(
            name,
            of,
            *(f"{x:.3g}" if x else "" for x in (floor.compute, floor.memory, floor.ici, floor.dcn)),
            f"{floor.seconds:.3g}",
            floor.binds,
            **style,
        )

    for program in fit.programs:
        if not program.floors:
            table.add_row(program.name, "", *("",) * 4, "not counted", "it did not compile")
            continue
        for (phase, loop), floor in sorted(program.floors.items(), key=_in_order):
            if floor.seconds > 1e-6:
                row(f"  {phase}", f"a cycle, {loop_name(loop)}" if loop else "", floor, style="dim")
        for loop in sorted({loop for _, loop in program.floors if loop}, reverse=True):
            parts = [floor for (_, of), floor in program.floors.items() if of == loop]
            row(f"  {loop_name(loop)}", "a cycle", sum(parts, Floor()))
        row(program.name, "all", fit.floor(program), style="bold")
    if fit.seconds is not None:
        table.add_row("a step", "", *("",) * 4, f"{fit.seconds:.3g}", "", style="bold")
    for column in table.columns[2:7]:
        column.justify = "right"
    return table


def _in_order(entry: tuple[tuple[str, int], Floor]) -> tuple[int, int]:
    name = entry[0][0].split(",")[0]
    return -entry[0][1], SCOPES.index(name) if name in SCOPES else len(SCOPES)


def show(fit: Fit, console: Console) -> None:
    """Prints all of it."""
    console.print(verdict(fit), style="bold", highlight=False, soft_wrap=True)
    console.print(workload(fit), highlight=False, soft_wrap=True)
    console.print(memory_table(fit))
    for line in bars(fit):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(floor_table(fit))
    for line in (most(fit), host(fit), compiled_how(fit), f"Chip: {fit.topology.chip.source}."):
        console.print(line, highlight=False, soft_wrap=True)


def as_json(fit: Fit) -> dict[str, Any]:
    """All of it, for machines."""

    def of_program(program: Program) -> dict[str, Any]:
        phases = [
            {"phase": phase, "loop": loop, **of_floor(floor)}
            for (phase, loop), floor in program.floors.items()
        ]
        whole = of_floor(fit.floor(program)) if program.floors else None
        return {
            "name": program.name,
            "needed_bytes": program.needed,
            "bytes": program.kinds,
            "compiled_layers": program.layers,
            "refused": program.refused,
            "compile_seconds": round(program.seconds, 1),
            "floor": whole,
            "phases": phases,
        }

    return {
        "model": fit.config.model.name,
        "topology": fit.topology.name,
        "devices": fit.topology.count,
        "mesh": fit.mesh,
        "versions": versions(fit),
        "fits": fit.left >= 0,
        "left_bytes": fit.left,
        "tightest": fit.tightest.name,
        "granted_bytes": int(fit.topology.chip.granted_bytes),
        "k": fit.k,
        "answer_tokens": fit.length,
        "tokens_a_cycle": fit.accepted,
        "cycles": fit.cycles,
        "micro_batch_rows": fit.micro_batch[0],
        "micro_batches": fit.micro_batch[1],
        "step_floor_seconds": fit.seconds,
        "programs": [of_program(program) for program in fit.programs],
        "host_bytes": fit.host_bytes,
        "largest_by_sums": dataclasses.asdict(fit.largest),
    }


def of_floor(floor: Floor) -> dict[str, Any]:
    """A floor's parts, in three digits."""
    return {name: float(f"{value:.4g}") for name, value in dataclasses.asdict(floor).items()} | {
        "seconds": float(f"{floor.seconds:.4g}"),
        "binds": floor.binds,
    }


def svg(fit: Fit) -> str:
    """The bars of memory as a picture."""
    room, left, step, width, beside = fit.topology.chip.granted_bytes, 90, 34, 640, 60
    said = textwrap.wrap(verdict(fit), (left + width) // 8)
    top = 28 + 18 * len(said)
    scale = width / (1.05 * max(room, *(program.needed for program in fit.programs)))
    height = top + step * len(fit.programs) + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + beside}" '
        f'height="{height}" font-size="12" '
        "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    parts += [
        f'<text x="10" y="{20 + 18 * i}" font-weight="bold">{escape(line)}</text>'
        for i, line in enumerate(said)
    ]
    for i, program in enumerate(fit.programs):
        x, y = float(left), top + i * step
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{program.name}</text>')
        for kind, size in shown(program).items():
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="22" '
                f'fill="{COLOURS[kind]}">'
                f"<title>{kind} {size / GIB:.2f} GiB</title></rect>"
            )
            x += size * scale
        parts.append(f'<text x="{x + 4:.1f}" y="{y + 16}">{program.needed / GIB:.1f} GiB</text>')
    end, bottom = left + room * scale, top + step * len(fit.programs)
    parts.append(
        f'<line x1="{end:.1f}" y1="{top - 6}" x2="{end:.1f}" y2="{bottom}" stroke="black" '
        'stroke-dasharray="4"/>'
    )
    parts.append(
        f'<text x="{end:.1f}" y="{bottom + 14}" text-anchor="middle">{room / GIB:.1f} GiB a device'
        "</text>"
    )
    used = [kind for kind in COLOURS if any(program.kinds.get(kind) for program in fit.programs)]
    for i, kind in enumerate(used):
        x, y = left + (i % 4) * 150, bottom + 26 + (i // 4) * 18
        parts.append(
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLOURS[kind]}"/>'
            f'<text x="{x + 16}" y="{y + 10}">{kind}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
