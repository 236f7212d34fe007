"""What every benchmark shares: interleaved timing, the machine, its copy bandwidth, counted bytes,
results as data."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jspec.model import ModelConfig, Policy
from jspec.output import Output
from jspec.progress import telling

ROOT = Path(__file__).resolve().parent.parent


def in_turn(programs: Mapping[Any, Callable[[], Any]],
            rounds: int) -> Iterator[tuple[Any, float, Any]]:
    """(name, seconds, result) of `rounds` runs of each program, taken in turn, so that all of them
    see the same drifting machine. Nothing is run before: what has not been compiled is compiled
    within its first seconds."""
    for _ in range(rounds):
        for name, program in programs.items():
            begin = time.perf_counter()
            result = jax.block_until_ready(program())
            yield name, time.perf_counter() - begin, result


def interleaved(programs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of `rounds` runs of each program, `in_turn`. Each runs once before, which compiles it
    and is not counted."""
    with telling("compiling, and running once", total=len(programs)) as advance:
        for program in programs.values():
            jax.block_until_ready(program())
            advance()
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    with telling("timing", total=rounds * len(programs)) as advance:
        for name, taken, _ in in_turn(programs, rounds):
            seconds[name].append(taken)
            advance()
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def copy_bandwidth(size: int | None = None) -> float:
    """Bytes per second of a plain copy of `size` bytes, read plus write, on the default device.

    The CPU's is a memcpy by all cores into memory that is there already: XLA would pay for fresh
    pages instead.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (2**29 if on_cpu else 2**31)
    if on_cpu:
        cores = os.cpu_count() or 1
        sources, targets = (np.ones((cores, size // cores // 4), np.float32) for _ in range(2))
        with ThreadPoolExecutor(cores) as pool:
            seconds = interleaved({"copy": lambda: list(pool.map(np.copyto, targets, sources))}, 7)
        return 2 * sources.nbytes / median(seconds["copy"])
    array = jax.random.bits(jax.random.key(0), (size // 4,))
    copy = jax.jit(lambda x: x + 1)  # adding one keeps XLA from aliasing input and output
    seconds = interleaved({"copy": lambda: copy(array)}, 7)
    return 2 * array.nbytes / median(seconds["copy"])


def weight_bytes(policy: Policy) -> int:
    """Bytes of weights that a decode step has to read: all but an untied embedding, of which it
    reads a row a token."""
    total = sum(x.nbytes for x in jax.tree.leaves(policy.weights))
    return total if policy.config.tie_embeddings else total - policy.weights["embed"].nbytes


def kv_bytes(config: ModelConfig, itemsize: int, positions: float) -> float:
    """Bytes of keys and values of `positions` cached tokens."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize * positions


def machine() -> dict[str, Any]:
    """What this was measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                 if "model name" in line]
        cpu = named[0] if named else cpu
    device = jax.devices()[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "device": device.device_kind,
            "devices": jax.device_count(), "platform": device.platform, "jax": jax.__version__,
            "python": platform.python_version(), "load_average": os.getloadavg()[0]}


def commit() -> str:
    """The checkout's commit, with a plus if files differ from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True,
                              text=True).stdout.strip()

    return (git("rev-parse", "--short=12",
                "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""))


def command() -> str:
    """What this process was started as: `jspec bench ...`, or `python -m benchmarks.NAME ...`."""
    script = Path(sys.argv[0])
    module = (f"python -m benchmarks.{script.stem}" if script.parent == ROOT / "benchmarks"
              else script.name)
    return " ".join([module, *map(shlex.quote, sys.argv[1:])])


def circumstances() -> dict[str, Any]:
    """What was run, on what, when."""
    return {"command": command(), "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}


def report(rows: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """A result as data: its circumstances, and the rows."""
    return {**circumstances(), **facts, "rows": rows}


def write_json(written: Output | None, result: Any) -> None:
    """Write a result to the file that `open_output` opened before there was one, if there is to be
    any."""
    if written:
        written.write(json.dumps(result, indent=1) + "\n")
