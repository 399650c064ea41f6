"""Weights that are more than one array (`lowrank`, `int8`), and the few ways in which a model reads a weight (`weight`,
`project`, `lookup`)."""

from __future__ import annotations

from lm.weights.int8 import Int8
from lm.weights.lowrank import LowRank
from lm.weights.weight import (
    BELOW,
    AnyWeight,
    Declared,
    Weight,
    dense,
    inside,
    noting,
    param,
    product,
    rows,
    special,
    transposed,
)

__all__ = [
    "BELOW",
    "AnyWeight",
    "Declared",
    "Int8",
    "LowRank",
    "Weight",
    "dense",
    "inside",
    "noting",
    "param",
    "product",
    "rows",
    "special",
    "transposed",
]
