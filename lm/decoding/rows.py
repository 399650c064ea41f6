"""Answers of one batch that differ in everything but the model: what is asked for, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lm.decoding.sampling import Sampling


@dataclass(frozen=True)
class Row:
    """One answer of a batch: how it is drawn, by which seed, and how many tokens it may have."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int = 128


class Piece(NamedTuple):
    """New tokens of row `row` with their log-probabilities (nats), and of each the likeliest alternatives as (id,
    log-probability); `finish`: ``stop`` or ``length`` with the last ones, else empty."""

    row: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: str


def pairs(ids_Rk: np.ndarray, logprobs_Rk: np.ndarray) -> list[list[tuple[int, float]]]:
    """Alternatives of every token as Python values."""
    return [list(zip(a, b, strict=True)) for a, b in zip(ids_Rk.tolist(), logprobs_Rk.tolist(), strict=True)]
