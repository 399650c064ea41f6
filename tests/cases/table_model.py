"""A language model that is a table: logits of the next token by the last one. All its texts can be counted.

With eight tokens and texts of four there are 4,096 of them: what a way of drawing does is compared with what it should
do text by text, and no transformer is compiled.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

V = 8
LENGTH = 4


@dataclass(frozen=True, eq=False)
class TableModel:
    """`logits_VV`: row = last token, column = next token."""

    logits_VV: np.ndarray

    @staticmethod
    def random(seed: int, sharp: float = 1.0) -> TableModel:
        return TableModel(sharp * np.random.default_rng(seed).normal(size=(V, V)))

    @property
    def p_VV(self) -> np.ndarray:
        """Probabilities of the next token by the last one."""
        e = np.exp(self.logits_VV - self.logits_VV.max(-1, keepdims=True))
        return np.asarray(e / e.sum(-1, keepdims=True))

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits ``[B, T, V]`` of the token after each."""
        return np.asarray(self.logits_VV[tokens_BT])

    def texts(self, last: int, n: int = LENGTH) -> np.ndarray:
        """The probability of every text of `n` tokens after `last`, as an array of n axes of length V."""
        out = np.zeros((V,) * n)
        for text in itertools.product(range(V), repeat=n):
            out[text] = np.prod([self.p_VV[a, b] for a, b in itertools.pairwise((last, *text))])
        return out

    def likeliest(self, last: int, n: int = LENGTH) -> list[int]:
        """The greedy text."""
        out: list[int] = []
        for _ in range(n):
            out.append(int(self.logits_VV[out[-1] if out else last].argmax()))
        return out


def expected_accepted(target: TableModel, drafter: TableModel, last: int, n: int) -> float:
    """How many of `n` drafted tokens exact acceptance takes on average: each with the overlap of the two
    distributions, until one is not taken (arXiv 2211.17192, section 3)."""
    total, alive = 0.0, np.zeros(V)
    alive[last] = 1.0
    overlap_VV = np.minimum(target.p_VV, drafter.p_VV)
    for _ in range(n):
        alive = alive @ overlap_VV
        total += float(alive.sum())
    return total
