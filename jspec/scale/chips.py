"""What a chip has, as its vendor says it: one table, which floors and projections read."""

from __future__ import annotations

import dataclasses
import difflib

from jspec.errors import InputError

GIB = 2**30
HOP = 1e-6
"""Seconds from one chip to its neighbour, about."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them (a tpu7x chip is two). Rates are a second, of dense products.

    Attributes:
      platform: "tpu" or "gpu".
      hbm_bytes: of memory. granted_bytes: what of it the compiler (TPU) or JAX by default (GPU)
        gives a program.
      hbm_bandwidth: bytes, read or written.
      bf16, int8, fp8: operations, a multiplication and an addition being two. None: not faster
        than bf16.
      links, link_bandwidth: to its neighbours (an axis of a torus has two), and bytes one way
        over each. A GPU's switch is one link.
      dcn_bandwidth: bytes one way between slices or NVLink domains, its share of its host's cards.
      host_bytes: of host memory, its share. devices_a_host: as many share one host.
      source: of the figures, and which was taken where sources differ.
    """

    name: str
    platform: str
    hbm_bytes: float
    granted_bytes: float
    hbm_bandwidth: float
    bf16: float
    int8: float | None
    fp8: float | None
    links: int
    link_bandwidth: float
    dcn_bandwidth: float
    host_bytes: float
    devices_a_host: int
    source: str

    def rate(self, dtype: str) -> float:
        """Operations a second in a dtype ("bfloat16", "int8", "fp8"; float32 at bfloat16's rate, as
        a TPU multiplies by default)."""
        return {"int8": self.int8, "fp8": self.fp8}.get(dtype) or self.bf16


_GOOGLE = "cloud.google.com/tpu/docs/{}, links as one sees them used: jax-ml.github.io/scaling-book"
_NVIDIA = "NVIDIA's data sheet of the {}; granted: the 75% that JAX takes by default"

CHIPS = {chip.name: chip for chip in (
    Chip("v5e", "tpu", 16 * GIB, 15.75 * GIB, 8.2e11, 1.97e14, 3.94e14, None, 4, 4.5e10,
         3.1e9, 48e9, 4, _GOOGLE.format("v5e") + "; granted: libtpu's message; 2 x 100 Gb/s a host "
         "of 8 chips"),
    Chip("v5p", "tpu", 96 * GIB, 95.73 * GIB, 2.46e12, 4.59e14, 9.18e14, None, 6, 9e10,
         6.25e9, 112e9, 4, _GOOGLE.format("v5p") + "; bandwidth: JAX's tpu_info, the vendor says "
         "2.77e12; granted: libtpu's message"),
    Chip("v6e", "tpu", 32 * GIB, 31.25 * GIB, 1.64e12, 9.18e14, 1.84e15, 9.18e14, 4, 9e10,
         1.25e10, 180e9, 4, _GOOGLE.format("v6e") + "; granted: libtpu's message; 4 x 200 Gb/s a "
         "host of 8 chips"),
    Chip("tpu7x", "tpu", 96 * GIB, 95.73 * GIB, 3.7e12, 1.15e15, None, 2.3e15, 6, 5e10,
         6.25e9, 120e9, 8, _GOOGLE.format("tpu7x") + "; a device is half a chip; 1.2e12 B/s of a "
         "chip's links both ways; 2 x 200 Gb/s a host of 4 chips"),
    Chip("h100", "gpu", 80 * GIB, 60 * GIB, 3.35e12, 9.89e14, 1.98e15, 1.98e15, 1, 4.5e11,
         5e10, 256e9, 8, _NVIDIA.format("H100 SXM")),
    Chip("h200", "gpu", 141e9, 106e9, 4.8e12, 9.89e14, 1.98e15, 1.98e15, 1, 4.5e11,
         5e10, 256e9, 8, _NVIDIA.format("H200 SXM")),
    Chip("b200", "gpu", 180 * GIB, 135 * GIB, 7.7e12, 2.25e15, 4.5e15, 4.5e15, 1, 9e11,
         5e10, 256e9, 8, _NVIDIA.format("DGX B200")),
    Chip("gb200", "gpu", 185 * GIB, 139 * GIB, 8e12, 2.5e15, 5e15, 5e15, 1, 9e11,
         1e11, 240e9, 4, _NVIDIA.format("GB200 NVL72") + "; 72 devices in an NVLink domain"),
)}


def chip(name: str) -> Chip:
    """The chip of that name. Raises InputError, naming those there are."""
    if name not in CHIPS:  # jspec.arguments' words, which are not to be had without JAX
        near = "".join(f"; did you mean {n}?" for n in difflib.get_close_matches(name, CHIPS, 1))
        raise InputError(f"chip {name!r} is not known{near}; known: {', '.join(CHIPS)}")
    return CHIPS[name]
