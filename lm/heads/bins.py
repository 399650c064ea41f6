"""Heads over ordered bins: where on [-1, 1] the id j of the vocabulary lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lm.errors import UserError
from lm.heads.base import Head
from lm.plug import Model, seed_field


@dataclass(frozen=True)
class Bins(Head):
    """Every id of the vocabulary is a bin of a bounded quantity that is mapped to [-1, 1].

    Id j has the centre ``-1 + (2j + 1) / V`` (arXiv 2410.22269, section 2.2). `order` puts it in another place: id j is
    the ``order[j]``-th bin (a discrete vocabulary whose ids were numbered without regard to their meaning). `centres`
    gives the centres themselves, by id, for bins of unequal width. `shuffle` is a seed of a random order: the control
    that takes the meaning of the order away. At most one of the three. `epsilon` is added to what the head computes
    before the logarithm.
    """

    order: tuple[int, ...] = ()
    centres: tuple[float, ...] = ()
    shuffle: int | None = seed_field(None)
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum((bool(self.order), bool(self.centres), self.shuffle is not None)) > 1:
            raise UserError("model.head: order, centres and shuffle say the same thing; valid: one of them, or none")
        if self.order and sorted(self.order) != list(range(len(self.order))):
            raise UserError(
                f"model.head.order: found {_short(self.order)}; valid: every place from 0 to {len(self.order) - 1} once"
            )
        if not all(-1.0 <= c <= 1.0 for c in self.centres):
            raise UserError(f"model.head.centres: found {_short(self.centres)}; valid: numbers in [-1, 1]")
        if len(set(self.centres)) < len(self.centres):
            raise UserError(f"model.head.centres: found {_short(self.centres)}; valid: no centre twice")
        if not 0.0 < self.epsilon < 1.0 or not math.isfinite(self.epsilon):
            raise UserError(f"model.head.epsilon: must lie in (0, 1), found {self.epsilon}")

    def check(self, cfg: Model) -> None:
        """Raises `UserError` when the bins are not as many as the ids of the vocabulary."""
        for name, n in (("order", len(self.order)), ("centres", len(self.centres))):
            if n and n != cfg.vocab_size:
                raise UserError(
                    f"model.head.{name}: {n} bins, but model.vocab_size = {cfg.vocab_size} ids; "
                    "valid: one each, or none"
                )
        if cfg.vocab_size < 2:
            raise UserError(f"model.vocab_size: {cfg.vocab_size} bins make no distribution; valid: 2 or more")

    def bins(self, n: int) -> np.ndarray:
        """The centres of ids 0 … n - 1, float64 ``[n]``."""
        if self.centres:
            return np.array(self.centres, np.float64)
        place = np.arange(n)
        if self.order:
            place = np.array(self.order)
        elif self.shuffle is not None:
            place = np.random.default_rng(self.shuffle).permutation(n)
        return -1.0 + (2.0 * place + 1.0) / n


def _short(values: tuple[float, ...]) -> str:
    return str(values) if len(values) <= 6 else f"({', '.join(map(str, values[:5]))}, … {len(values)} in all)"
