"""Where a step's time and memory go: traces, and seconds by phase read from them.

A phase is a `jax.named_scope`. XLA keeps the scope of every operation in the compiled program, and the profiler tells
which operation ran when; the two are joined by the operation's name. The same on CPU, GPU and TPU.
"""

import contextlib
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

PHASES = ("reshard", "prefill", "propose", "verify", "accept", "commit", "observe", "decode", "policy_loss",
          "draft_loss", "optimizer", "draft_optimizer")
PARTS = ("attention", "mlp", "head", "token_logprobs")
OTHER = "other operations"
# containers, whose time is that of what is in them, and what never runs
_NO_WORK = {"while", "call", "conditional", "async-start", "async-done", "parameter", "tuple", "get-tuple-element"}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^%?([\w.\-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.\-]+)")


@contextlib.contextmanager
def trace(directory: Path) -> Iterator[None]:
    """Traces what runs inside, for XProf (`xprof DIRECTORY`) and Perfetto (ui.perfetto.dev: perfetto_trace.json.gz)."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would slow the host down and bury the operations
    with jax.profiler.trace(str(directory), create_perfetto_trace=True, profiler_options=options):
        yield


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a step; `part` is what inside it, such as attention, or empty."""

    name: str
    part: str = ""


def phase_of(op_name: str) -> Phase:
    """The phase of an operation by its scopes, such as 'jit(update)/policy_loss/transpose(jvp(trunk))/mlp/dot'."""
    scopes = re.split(r"[/();]+", op_name)
    name = next((scope for scope in PHASES if scope in scopes), OTHER)
    if name == "decode":
        name = "decode, between phases"
    if name.endswith("_loss"):
        name += ", backward" if "transpose(" in op_name else ", forward"
    return Phase(name, next((scope for scope in reversed(scopes) if scope in PARTS), ""))


def phases_of_program(hlo: str, default: str = OTHER) -> dict[str, Phase]:
    """The phase of every operation in a compiled program's text (`compiled.as_text()`), containers left out.

    An operation that XLA made itself, without a scope, has the phase of what is fused into it, else `default`.
    """
    names: dict[str, str] = {}
    calls: dict[str, str] = {}
    inside: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            header = _COMPUTATION.match(line)
            computation = header.group(1) if header else computation
            continue
        instruction, opcode = found.groups()
        if opcode in _NO_WORK:
            continue
        scope, called = _OP_NAME.search(line), _CALLS.search(line)
        names[instruction] = scope.group(1) if scope else ""
        if scope and "/" in scope.group(1):
            inside.setdefault(computation, scope.group(1))
        if called:
            calls[instruction] = called.group(1)
    phases = {}
    for instruction, name in names.items():
        phase = phase_of(name if "/" in name else inside.get(calls.get(instruction, ""), name))
        phases[instruction] = dataclasses.replace(phase, name=default) if phase.name == OTHER else phase
    return phases


def seconds_by_phase(directory: Path, programs: Mapping[str, Mapping[str, Phase]]) -> dict[Phase, float]:
    """Seconds in which operations of each phase ran, from the newest trace under `directory`.

    Args:
      programs: for each program traced, by its XLA module's name, what `phases_of_program` gives.

    Operations that run at the same time, on several threads or streams, count once. Of several devices the busiest is
    told; waiting is nobody's.
    """
    newest = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    devices = []
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        spans: dict[Phase, list[tuple[float, float]]] = defaultdict(list)
        for line in plane.lines:
            for event in line.events:
                phase = _phase_of_event(event, programs)
                if phase is not None:
                    spans[phase].append((event.start_ns, event.start_ns + event.duration_ns))
        devices.append({phase: _covered(found) / 1e9 for phase, found in spans.items()})
    return max(devices, key=lambda device: sum(device.values()), default={})


def _phase_of_event(event: Any, programs: Mapping[str, Mapping[str, Phase]]) -> Phase | None:
    if event.name.startswith(("end: ", "Threadpool")):
        return None
    stats = dict(event.stats)
    operation = str(stats.get("hlo_op") or event.name.split(" ")[0].removeprefix("%"))
    if "hlo_module" in stats:
        return programs.get(str(stats["hlo_module"]), {}).get(operation)
    return next((phases[operation] for phases in programs.values() if operation in phases), None)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def module_name(hlo: str) -> str:
    """The name that a compiled program has in traces."""
    return re.match(r"HloModule ([\w.\-]+)", hlo).group(1)


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled program needs on each device; `peak` is all of it, donated arguments counted once."""
    stats = compiled.memory_analysis()
    made = {"arguments": stats.argument_size_in_bytes, "results": stats.output_size_in_bytes,
            "donated": stats.alias_size_in_bytes, "temporaries": stats.temp_size_in_bytes}
    return made | {"peak": made["arguments"] + made["results"] - made["donated"] + made["temporaries"]}
