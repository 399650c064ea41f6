"""Rows of one shape that one program reads: whole texts, packed texts, padded texts, texts in another order."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cases.model import TOKENS, T

ROWS = 8
CUTS = (30, 9)  # where the two documents of a packed row meet
SHORT = T - 5
LATE = 9  # so many last tokens differ in the changed rows
LEFT, RIGHT = 7, 11  # tokens in padding: two, so that what leaks from it differs with the side


@dataclass(frozen=True, eq=False)
class Rows:
    """Int ``[8, T]`` each; an index of -1 is padding."""

    tokens_BT: np.ndarray
    index_BT: np.ndarray
    segments_BT: np.ndarray

    def alone(self, row: int) -> Rows:
        """That row, and nothing but padding in the others."""
        index_BT = np.full_like(self.index_BT, -1)
        index_BT[row] = self.index_BT[row]
        return Rows(self.tokens_BT, index_BT, self.segments_BT)


def _row(tokens: np.ndarray, left: int = 0, fill: int = RIGHT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One text with padding on both sides, where it is shorter than T."""
    n = len(tokens)
    right = T - n - left
    padded = np.concatenate([np.full(left, fill), tokens, np.full(right, fill)])
    return padded, np.array([*[-1] * left, *range(n), *[-1] * right]), np.ones(T, np.int64)


def _packed(tokens: np.ndarray, cut: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tokens, np.array([*range(cut), *range(T - cut)]), np.array([1] * cut + [2] * (T - cut))


def _rows(*rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Rows:
    assert len(rows) == ROWS
    return Rows(*(np.stack(column) for column in zip(*rows, strict=True)))


@functools.cache
def texts() -> Rows:
    """0, 1: the texts A and B; 2, 3: each as two documents in one row; 4 … 7: those documents, alone."""
    a, b = TOKENS
    i, j = CUTS
    return _rows(
        *(_row(a), _row(b)),
        *(_packed(a, i), _packed(b, j)),
        *(_row(a[:i]), _row(a[i:]), _row(b[:j]), _row(b[j:])),
    )


DOCUMENTS = tuple(  # (packed row, its part, row of that document alone)
    (packed, part, alone)
    for packed, cut, first in ((2, CUTS[0], 4), (3, CUTS[1], 6))
    for part, alone in ((slice(0, cut), first), (slice(cut, T), first + 1))
)


@functools.cache
def others() -> Rows:
    """0 … 3: the documents of `texts` in reverse; 4, 5: B and A with other last tokens; 6, 7: B and A."""
    a, b = TOKENS
    whole = texts()
    late = [np.concatenate([x[: T - LATE], (x[T - LATE :] + 17) % 61]) for x in (b, a)]
    documents = [tuple(x[r] for x in (whole.tokens_BT, whole.index_BT, whole.segments_BT)) for r in (7, 6, 5, 4)]
    return _rows(*documents, *(_row(x) for x in (*late, b, a)))  # type: ignore[arg-type]


MOVED = (*enumerate((7, 6, 5, 4)), (6, 1), (7, 0))  # (row of `others`, the same of `texts`)
CHANGED = ((4, 6), (5, 7))  # (row of `others` with other last tokens, the same without)


@functools.cache
def short() -> Rows:
    """The first T - 5 tokens: 0, 1 with padding on the left; 2, 3 on the right; 4 … 7 the same once more."""
    a, b = (x[:SHORT] for x in TOKENS)
    four = (*(_row(x, T - SHORT, LEFT) for x in (a, b)), *(_row(x) for x in (a, b)))
    return _rows(*four, *four)
