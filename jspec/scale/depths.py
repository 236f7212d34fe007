"""A model of many layers, known from a few: programs are compiled at small depths, and what is
counted of them goes on in a straight line, a layer of a kind adding the same each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jspec.model import ModelConfig

TWO, MIXED = ((2, 0), (4, 0)), ((1, 1), (1, 3), (2, 1))
"""(layers of the kind there is most of, of the other) that are compiled: of one kind, and of
both."""


def kinds(model: ModelConfig) -> tuple[int, int]:
    """(dense layers, sparse layers)."""
    if model.experts is None:
        return model.num_layers, 0
    dense = len(model.experts.dense_layers)
    return dense, model.num_layers - dense


def shallower(model: ModelConfig, dense: int, sparse: int) -> ModelConfig:
    """The model with so many layers of each kind, the dense ones first."""
    if model.experts is None:
        return dataclasses.replace(model, num_layers=dense)
    experts = dataclasses.replace(model.experts, dense_layers=tuple(range(dense)))
    return dataclasses.replace(model, num_layers=dense + sparse, experts=experts)


def depths(model: ModelConfig, asked: Sequence[int] = ()) -> list[ModelConfig]:
    """The models that are compiled in its place: itself where it has no more layers than that.

    asked: other numbers of layers, of a model all of whose layers are alike.
    """
    dense, sparse = kinds(model)
    if dense and sparse:
        pairs = [(a, b) if dense >= sparse else (b, a) for a, b in MIXED]
    else:
        numbers = asked or [a for a, _ in TWO]
        pairs = [(n, 0) if dense else (0, n) for n in numbers]
    if any(a > dense or b > sparse for a, b in pairs) or (dense, sparse) in pairs:
        return [model]
    return [shallower(model, *pair) for pair in pairs]


def extended(model: ModelConfig, compiled: Sequence[ModelConfig], values: Sequence[float]) -> float:
    """What the model would give, of what each of the shallower ones gave; never below the last
    of these."""
    if len(compiled) == 1:
        return float(values[0])
    dense, sparse = kinds(model)
    both = bool(dense and sparse)

    def terms(layers: tuple[int, int]) -> tuple[float, ...]:
        return (1.0, *layers) if both else (1.0, sum(layers))

    rows = np.array([terms(kinds(one)) for one in compiled])
    line, *_ = np.linalg.lstsq(rows, np.array(values, float), rcond=None)
    return max(float(np.dot(terms((dense, sparse)), line)), float(values[-1]))
