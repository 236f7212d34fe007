"""The compilers of chips that are not here, and what they say of a program. JAX, libtpu and Mosaic
must have been told so before they started (`compile.py` does it): MOSAIC_GPU_DUMP_TO is where
Mosaic writes what `resources` reads."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jspec.errors import InputError
from jspec.scale import topologies

POD = "v5p pod"
TPUS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1",
        POD: "v5p:4x4x2"}
"""8 devices each, and the 32 of configs/qwen3-8b-pod.yaml, on the mesh that it names."""
GPU = "sm_90"


def devices(chip: str) -> list[Any]:
    """Devices of a machine that is not here. Exits with code 2 where its compiler is not
    installed."""
    try:
        if chip == GPU:
            return topologies.devices(topologies.topology("h200"))
        return topologies.described(chip, platform="tpu", topology_name=TPUS.get(chip, chip))
    except InputError as error:
        said = str(error.__cause__).splitlines()[0]
        print(f"no compiler for {chip}: {said}; pip install -e '.[aot]', and let one process use "
              "libtpu at a time", file=sys.stderr)
        raise SystemExit(2) from None


def dumps() -> Path:
    return Path(os.environ["MOSAIC_GPU_DUMP_TO"])


def compiled(function: Any, args: Any, chip: str) -> Any:
    """`function`, a jax.jit, for `args` with shardings on the chip's devices."""
    return topologies.lower_for("gpu" if chip == GPU else "tpu", function, args).compile()


def on(sharding: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def resources(chip: str, program: Any) -> dict[str, Any]:
    """What one compiled program takes; of a TPU's vector memory, and of a multiprocessor."""
    memory = program.memory_analysis()
    found = {"temp_bytes": memory.temp_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes}
    if chip != GPU:
        calls = [line for line in program.as_text().splitlines()
                 if 'custom_call_target="tpu_custom_call"' in line]
        sizes = [int(size) for line in calls
                 for used in re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', line)
                 for space, size in re.findall(
                     r'"memory_space":"(\d+)","offset":"\d+","size":"(\d+)"', used) if space == "1"]
        return found | {"vmem_bytes": max(sizes, default=0)}
    logs, passes = ("".join(path.read_text() for path in dumps().glob(pattern))
                    for pattern in ("*.ptxas", "*mlir-passes.log"))

    def most(pattern: str, text: str) -> int:
        return max(map(int, re.findall(pattern, text)), default=0)

    if not logs:  # the kernel of the row before, in another program: it is not compiled twice
        return found
    return (found | {"registers": most(r"Used (\d+) registers", logs),
                     "spill_bytes": most(r"(\d+) bytes spill", logs),
                    "smem_bytes": most(r"dynamic_shared_memory_size %c(\d+)_i32", passes)})


def timed(chip: str, function: Any, args: Any,
          read: Callable[[str], dict[str, Any]] = lambda _: {}) -> dict[str, Any]:
    """One row: what the program takes and what `read` finds in its text, or why there is none."""
    for old in dumps().iterdir():
        old.unlink()
    begin = time.perf_counter()
    try:
        program = compiled(function, args, chip)
    except NotImplementedError as refusal:
        return {"refused": str(refusal)}
    except Exception as error:  # a compiler's: this is what the run is there to find
        return {"failed": str(error)[:500]}
    return {"seconds": round(time.perf_counter() - begin, 2), **resources(chip, program),
            **read(program.as_text())}
