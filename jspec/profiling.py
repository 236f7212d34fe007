"""Where a step's time and memory go: traces, and seconds by phase read from them.

A phase is a `jax.named_scope`. XLA keeps the scope of every operation in the compiled program, and
the profiler tells which operation ran when; the two are joined by the operation's name. The same on
CPU, GPU and TPU.
"""

import contextlib
import dataclasses
import gzip
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jspec.hlo import Instruction, instructions

MEANING = {
    "reshard": "the weights, from the training layout to the rollout's",
    "prepare": "what the rollout makes of the weights before it begins",
    "prefill": "the prompts, through policy and draft",
    "noise": "random bits of the cycles",
    "propose": "the draft's tokens",
    "verify": "the policy's pass over them",
    "accept": "its logits, the verdict and the token after the accepted ones",
    "commit": "tokens and log-probabilities to where they are kept",
    "observe": "what the draft takes in of the verified tokens",
    "retire": "slots and blocks taken back from answers that are done",
    "pause": "the youngest rows' blocks to host memory, where the pool runs out",
    "resume": "and back",
    "admit": "slots, and what they share of their prompts, given to sequences that wait",
    "decode": "blocks for rows that grow, rows moved together, the loop's test, and what the loop "
    "copies",
    "collect": "the answers out of the rows",
    "remember": "what the drafter keeps of the rollout",
    "policy_loss": "the policy's loss on the answers",
    "draft_loss": "the draft's loss on the same answers",
    "optimizer": "the policy's gradient norm and new weights",
    "draft_optimizer": "the same of the draft",
    "rest": "what of that program belongs to no phase",
}
# the innermost first: all of decoding lies in "decode"
SCOPES = tuple(name for name in MEANING if name != "rest")
PARTS = ("attention", "mlp", "head", "token_logprobs")
OTHER = "other operations"
# what XLA needs to start the next one; a phase's track shows no hole there
BETWEEN_OPERATIONS_NS = 20_000.0
_LOOP = re.compile(r"loop_(\d+)")  # of the chain, by its rows
# containers, whose time is that of what is in them, and what never runs
_NO_WORK = {"while", "call", "conditional", "async-start", "async-done", "parameter", "tuple",
            "get-tuple-element"}


@contextlib.contextmanager
def trace(directory: Path) -> Iterator[None]:
    """Traces what runs inside, for XProf (`xprof DIRECTORY`) and Perfetto (ui.perfetto.dev:
    perfetto_trace.json.gz)."""
    options = jax.profiler.ProfileOptions()
    # Python's own calls would slow the host down and bury the operations
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), create_perfetto_trace=True, profiler_options=options):
        yield


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a step.

    Attributes:
      part: what inside it, such as attention, or empty. loop: the rows of the decode loop that it
        is in, 0 outside.
    """

    name: str
    part: str = ""
    loop: int = 0


def phase_of(op_name: str) -> Phase:
    """The phase of an operation by its scopes, such as
    'jit(update)/policy_loss/transpose(jvp(trunk))/mlp/dot'."""
    scopes = re.split(r"[/();]+", op_name)
    name = next((scope for scope in SCOPES if scope in scopes), OTHER)
    if name == "decode":
        name = "decode, between phases"
    if name.endswith("_loss"):
        name += ", backward" if "transpose(" in op_name else ", forward"
    loop = next((match for match in map(_LOOP.fullmatch, scopes) if match), None)
    return Phase(name, next((scope for scope in reversed(scopes) if scope in PARTS), ""),
                 int(loop.group(1)) if loop else 0)


def phases_of_program(hlo: str, default: str = OTHER) -> dict[str, Phase]:
    """The phase of every operation in a compiled program's text (`compiled.as_text()`), containers
    left out.

    An operation that XLA made itself, without a scope, belongs with what is fused into it, else
    with the nearest of the operations that it reads and that read it, else with the loop that it is
    in, else to `default`.
    """
    found = instructions(hlo)
    neighbours: dict[str, list[str]] = {name: list(one.operands) for name, one in found.items()}
    inside: dict[str, Phase] = {}
    caller: dict[str, str] = {}
    for name, one in found.items():
        for operand in one.operands:
            neighbours.setdefault(operand, []).append(name)
        for computation in one.called:
            caller.setdefault(computation, name)
        if "/" in one.scope and phase_of(one.scope).name != OTHER:
            inside.setdefault(one.computation, phase_of(one.scope))

    def own_phase(one: Instruction) -> Phase | None:
        # its scope is that of whatever else is computed from the argument
        if one.opcode == "parameter":
            return None
        phase = phase_of(one.scope)
        if phase.name != OTHER:
            return phase
        return next((inside[called] for called in one.called
                     if one.opcode == "fusion" and called in inside), None)

    own = {name: own_phase(one) for name, one in found.items()}

    def nearest(name: str) -> Phase | None:
        seen, level = {name}, [name]
        while level:
            for other in level:
                if own[other] is not None:
                    return own[other]
            level = list(dict.fromkeys(other for one in level for other in neighbours[one]
                                       if other in found and other not in seen))
            seen.update(level)
        above = caller.get(found[name].computation)
        return None if above is None else nearest(above)

    return {name: nearest(name) or Phase(default, phase_of(one.scope).part)
            for name, one in found.items() if one.opcode not in _NO_WORK}


Spans = list[tuple[float, float]]
"""(beginning, end) of stretches of time, in nanoseconds since the trace began."""


def spans_by_phase(directory: Path,
                   programs: Mapping[str, Mapping[str, Phase]]) -> dict[Phase, Spans]:
    """When operations of each phase ran, from the newest trace under `directory`: stretches in
    order, apart.

    Args:
      programs: for each program traced, by its XLA module's name, what `phases_of_program` gives.

    Operations that run at the same time, on several threads or streams, count once. Of several
    devices the busiest is told; waiting is nobody's.
    """
    devices = []
    for plane in jax.profiler.ProfileData.from_file(str(newest(directory, "*.xplane.pb"))).planes:
        spans: dict[Phase, Spans] = defaultdict(list)
        for line in plane.lines:
            for event in line.events:
                phase = _phase_of_event(event, programs)
                if phase is not None:
                    spans[phase].append((event.start_ns, event.start_ns + event.duration_ns))
        devices.append({phase: _joined(found) for phase, found in spans.items()})
    return max(devices, key=lambda device: sum(map(length, device.values())), default={})


def newest(directory: Path, pattern: str) -> Path:
    """The newest file of that kind under `directory`."""
    return max(directory.rglob(pattern), key=lambda path: path.stat().st_mtime)


def name_phases(directory: Path, spans: Mapping[Phase, Spans]) -> Path:
    """Writes the phases and the decode loops into the newest Perfetto trace under `directory`, a
    track for each. Returns its path.

    Operations have no scopes there, and those of a CPU in no other view either.
    """
    path = newest(directory, "perfetto_trace.json.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        recorded = json.load(file)
    events = recorded["traceEvents"]
    process = 1 + max((event.get("pid", 0) for event in events), default=0)
    tracks: dict[str, list[Spans]] = {}
    for phase in sorted(spans, key=in_order):
        tracks.setdefault(phase.name, []).append(spans[phase])
    for phase in sorted((phase for phase in spans if phase.loop), key=lambda phase: -phase.loop):
        tracks.setdefault(loop_name(phase.loop), []).append(spans[phase])
    added = [{"ph": "M", "pid": process, "name": "process_name", "args": {"name": "phases"}},
             {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": -1}}]
    for track, (name, found) in enumerate(tracks.items()):
        added += [{"ph": "M", "pid": process, "tid": track, "name": "thread_name",
                   "args": {"name": name}},
                  {"ph": "M", "pid": process, "tid": track, "name": "thread_sort_index",
                   "args": {"sort_index": track}}]
        added += [{"ph": "X", "pid": process, "tid": track, "name": name, "ts": start / 1e3,
                   "dur": (end - start) / 1e3}
                  for start, end in _joined(itertools.chain(*found), gap=BETWEEN_OPERATIONS_NS)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({**recorded, "traceEvents": [*added, *events]}, file)
    return path


def meaning(name: str) -> str:
    """What a phase of that name is, for people; 'update, rest' and 'policy_loss, forward' are names
    too."""
    first, _, rest = name.partition(", ")
    return MEANING.get("rest" if rest == "rest" else first, "")


def loop_name(rows: int) -> str:
    """What the decode loop of that many rows is called."""
    return f"loop of {rows} rows"


def in_order(phase: Phase) -> tuple[int, bool, str]:
    """Phases as a step goes through them."""
    name = phase.name.split(",")[0]
    return ((SCOPES.index(name) if name in SCOPES else len(SCOPES)), "backward" in phase.name,
            phase.name)


def _phase_of_event(event: Any, programs: Mapping[str, Mapping[str, Phase]]) -> Phase | None:
    if event.name.startswith(("end: ", "Threadpool")):
        return None
    stats = dict(event.stats)
    operation = str(stats.get("hlo_op") or event.name.split(" ")[0].removeprefix("%"))
    if "hlo_module" in stats:
        return programs.get(str(stats["hlo_module"]), {}).get(operation)
    return next((phases[operation] for phases in programs.values() if operation in phases), None)


def _joined(spans: Iterable[tuple[float, float]], gap: float = 0.0) -> Spans:
    """The union of stretches; those that are at most `gap` apart become one."""
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def length(spans: Spans) -> float:
    """Nanoseconds of stretches that are apart."""
    return sum(end - start for start, end in spans)


def module_name(hlo: str) -> str:
    """The name that a compiled program has in traces."""
    return re.match(r"HloModule ([\w.\-]+)", hlo).group(1)


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled program needs on each device; `peak` is all of it, donated arguments
    counted once."""
    stats = compiled.memory_analysis()
    made = {"arguments": stats.argument_size_in_bytes, "results": stats.output_size_in_bytes,
            "donated": stats.alias_size_in_bytes, "temporaries": stats.temp_size_in_bytes}
    return (made
            | {"peak": made["arguments"] + made["results"] - made["donated"] + made["temporaries"]})
