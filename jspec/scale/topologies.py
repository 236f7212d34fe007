"""Machines that are not here, by their vendor's names, and the compilers that take programs for
them.

A vendor's number counts cores (v5p), chips (v5e, v6e) or devices (tpu7x). libtpu wants a shape, and
checks neither that
a slice of that shape can be rented nor that there is one: the table here is what the vendor lists.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from jspec.errors import InputError
from jspec.scale.chips import Chip, chip

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "none",
}
"""What JAX and libtpu read when they start: no chip is looked for, and several compilers may run
side by side."""

_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
    "16x16x24",
)
SLICES: Mapping[str, tuple[tuple[str, ...], int, int]] = {
    "v5e": (_SQUARES, 1, 1),
    "v6e": (_SQUARES, 1, 1),
    "v5p": (_CUBES, 2, 1),
    "tpu7x": (_CUBES, 2, 2),
}
"""(shapes in chips, what a chip adds to the number in the name, JAX's devices of a chip) of each
TPU."""
ALIASES = {
    "v5litepod": "v5e",
    "v7x": "tpu7x",
    "tpu-v7x": "tpu7x",
    "ironwood": "tpu7x",
    "trillium": "v6e",
}
GPUS = {"sm_90": "h100", "h100": "h100", "h200": "h200"}

_HOPPER = """
platform_name: "CUDA" device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }} core_count: 132
  fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: 52428800
}}
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are connected.

    Attributes:
      name: the vendor's. shape: of the chips, () for one GPU. per_chip: devices of a chip.
      slices: as many of them, connected by their hosts' network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    per_chip: int = 1
    slices: int = 1

    @property
    def count(self) -> int:
        """Devices, as JAX counts them."""
        return math.prod(self.shape) * self.per_chip * self.slices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Of each axis, whether its ends are connected: a torus is made of whole cubes of 4, or of
        16 x 16."""
        if len(self.shape) == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)


def topology(name: str) -> Topology:
    """The machine of a vendor's name, such as v5p-1024, or of several slices, 2xv5p-1024. Raises
    InputError for one that does not exist, with those near it."""
    if name.lower() in GPUS:
        return Topology(name.lower(), chip(GPUS[name.lower()]), ())
    several = re.fullmatch(r"([1-9]\d{0,3})x(\D.*)", name)
    if several and several.group(2).rpartition("-")[0].lower() in {*SLICES, *ALIASES}:
        one, slices = topology(several.group(2)), int(several.group(1))
        if one.shape:
            return dataclasses.replace(one, name=f"{slices}x{one.name}", slices=slices)
    kind, _, number = name.lower().rpartition("-")
    kind = ALIASES.get(kind, kind)
    if kind not in SLICES:
        raise InputError(
            f"topology {name!r} does not exist; known: "
            f"{', '.join(f'{kind}-N' for kind in SLICES)}, and "
            f"one GPU: {', '.join(GPUS)}"
        )
    shapes, each, per_chip = SLICES[kind]
    sizes = {math.prod(_numbers(shape)) * each: shape for shape in shapes}
    if re.fullmatch("[0-9]+", number) and int(number) in sizes:
        return Topology(f"{kind}-{int(number)}", chip(kind), _numbers(sizes[int(number)]), per_chip)
    near = list(sizes)
    if re.fullmatch("[0-9]{1,9}", number):
        near = sorted(sorted(sizes, key=lambda size: abs(math.log(size / max(int(number), 1))))[:3])
    raise InputError(
        f"topology {name!r} does not exist; {kind} has "
        + ", ".join(f"{kind}-{size} ({sizes[size]})" for size in near)
    )


def _numbers(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape.split("x")))


def set_environment() -> None:
    """`ENVIRONMENT`, to be called before JAX starts."""
    os.environ.update(ENVIRONMENT)


def devices(of: Topology) -> list[Any]:
    """Its devices, for programs to be compiled for. Raises InputError where its compiler is not
    installed."""
    if of.chip.platform == "gpu":
        return described(
            of.name,
            platform="cuda",
            topology="1x1x1",
            target_config=_HOPPER.format(
                name=of.chip.name.upper(),
                memory=int(of.chip.hbm_bytes),
                bandwidth=int(of.chip.hbm_bandwidth),
            ),
        )
    return described(
        of.name,
        platform="tpu",
        topology_name=f"{of.chip.name}:{'x'.join(map(str, of.shape))}",
        num_slices=of.slices,
    )


def described(name: str, **description: Any) -> list[Any]:
    """The devices that `jax.experimental.topologies` describes so. Raises as `devices` does."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(**description).devices)
    except Exception as error:  # whatever a missing plugin or a busy libtpu raises
        said = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(
            f"no compiler for {name} is installed, or another process has it: {said[:200]}; "
            "pip install 'jspec[aot]'"
        ) from error


def lower_for(platform: str, program: Any, arguments: tuple) -> Any:
    """A `jax.jit` lowered for arguments with shardings on devices that are not here, to be
    compiled. platform: "tpu" or "gpu"; else that of the devices."""
    named = {"tpu": ("tpu",), "gpu": ("cuda",)}.get(platform)
    return program.trace(*arguments).lower(lowering_platforms=named)
