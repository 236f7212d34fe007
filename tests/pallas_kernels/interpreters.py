"""How each chip's kernels run on a machine without the chip."""

import dataclasses
from typing import Any

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.implementation import Implementation

PLAIN = Implementation("tpu", interpret=True)
"""Operations one after the other: fast, and jittable."""

# newer JAX raises at a race if it is not told; here it is asked for afterwards, see `races_found`
TOLD = {field.name for field in dataclasses.fields(InterpretGPUParams)} & {"on_race"}
RACES: dict[str, Any] = {"detect_races": True, **dict.fromkeys(TOLD, "warn")}
CHIPS = {"tpu": Implementation("tpu", interpret=pltpu.InterpretParams(**RACES)),
         "gpu": Implementation("gpu", interpret=InterpretGPUParams(
             **RACES, out_of_bounds_reads="uninitialized"))}
"""Memory spaces, copies in flight, threads, and races between them. Memory that nothing was written
to is NaN."""


def races_found(chip):
    """Whether the last kernel that `CHIPS[chip]` ran raced."""
    races = tpu_interpreter.races if chip == "tpu" else gpu_interpreter.get_races()
    return races.races_found


def forget(chip):
    """What a racing kernel leaves behind must not reach the next one."""
    if chip == "tpu":
        tpu_interpreter.reset_tpu_interpret_mode_state()
    else:
        gpu_interpreter.reset_gpu_interpret_mode_state()
