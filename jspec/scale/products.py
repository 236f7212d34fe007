"""Operations of the matrix products in a compiled program's text. A TPU's compiler writes them all
as convolutions, whose
batch axes it makes windows that are padded or dilated: only what meets a number that is there is an
  operation."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from jspec.hlo import Instruction

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")


def operations(one: Instruction, found: Mapping[str, Instruction], experts: int = 0) -> float:
    """Multiplications and additions of an instruction, 0 for what is no product. experts: see
    `grouped`."""
    shapes = [
        found[name].shapes[0] for name in one.operands[:2] if name in found and found[name].shapes
    ]
    if len(shapes) < 2:
        return 0.0
    if one.opcode == "convolution":
        return _convolution(one, *shapes)
    if one.opcode == "dot" or (
        one.opcode == "custom-call" and any(name in one.text for name in GEMMS)
    ):
        contracted = _CONTRACTED.search(one.text)
        depth = (
            [shapes[0][int(i)] for i in re.findall(r"\d+", contracted.group(1))]
            if contracted
            else [shapes[0][-1]]
        )
        return 2.0 * math.prod(one.shapes[0]) * math.prod(depth)
    if one.opcode == "custom-call" and "tpu_custom_call" in one.text:
        return grouped(one, found, experts)
    return 0.0


def grouped(one: Instruction, found: Mapping[str, Instruction], experts: int = 0) -> float:
    """Of a kernel that multiplies rows [m, k] by one of many matrices each, [e, k, n] or [e, n, k]:
    a row meets one matrix, 2 m k n in all; 0 for what is no such kernel.

    experts: of a layer, of which the matrices are those on this device. Rows of the others are
    among the m and passed over: they are taken to be as many to each expert. 0: there are no
    others.
    """
    shapes = [shape for name in one.operands if name in found for shape in found[name].shapes[:1]]
    made = one.shapes[0] if one.shapes else ()
    matrices = [shape for shape in shapes if len(shape) == 2]

    def mine(held: int) -> float:
        return held / experts if experts else 1.0

    if len(made) == 3:  # the matrices' gradient, of rows [m, k] and [m, n], which may lie turned
        for left, right in itertools.combinations(matrices, 2):
            for (m, k), (rows, n) in itertools.product((left, left[::-1]), (right, right[::-1])):
                if m == rows and sorted(made[1:]) == sorted((k, n)):
                    return mine(made[0]) * 2.0 * m * k * n
    for (m, k), (held, *sides) in itertools.product(
        matrices, (shape for shape in shapes if len(shape) == 3)
    ):
        if k in sides and made == (m, math.prod(sides) // k):
            return mine(held) * 2.0 * m * math.prod(sides)
    return 0.0


def _convolution(one: Instruction, left: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    of_left, of_kernel, of_made = _LABELS.search(one.text).groups()
    window = (
        dict(part.split("=") for part in _WINDOW.search(one.text).group(1).split())
        if "window=" in one.text
        else {}
    )
    spatial = sorted(letter for letter in of_made if letter.isdigit())
    pairs = 1.0
    for i, letter in enumerate(spatial):

        def at(key: str, default: str, i: int = i) -> str:
            return window[key].split("x")[i] if key in window else default

        pairs *= _meeting(
            left[of_left.index(letter)],
            one.shapes[0][of_made.index(letter)],
            int(at("size", "1")),
            int(at("stride", "1")),
            int(at("pad", "0_0").split("_")[0]),
            int(at("lhs_dilate", "1")),
            int(at("rhs_dilate", "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", one.text)
    batch = left[of_left.index("b")] // (int(groups.group(1)) if groups else 1)
    return 2.0 * pairs * batch * kernel[of_kernel.index("i")] * kernel[of_kernel.index("o")]


def _meeting(
    size: int, made: int, window: int, stride: int, pad: int, dilated: int, apart: int
) -> int:
    """How often a position of a window of one axis lies on a number of the operand, over all places
    of the window."""
    place = np.arange(made)[:, None] * stride - pad + np.arange(window)[None] * apart
    return int(((place % dilated == 0) & (place >= 0) & (place < size * dilated)).sum())
