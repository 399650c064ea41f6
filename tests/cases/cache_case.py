"""The tests every cache owes, as one class of two programs: what is read is what was written, on real keys and values.

One program reads a text in pieces and single tokens, the other cuts it elsewhere and commits paths of drafts. Row 1
begins with padding and ends before row 0: padding (index -1) is dropped, and every row counts for itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from cases import model
from cases.budget import Budget, once

N, HEADS, WIDTH = 20, 2, 4
LEFT, RIGHT = 4, 3  # tokens of padding of row 1
SPLITS = ((9, -2, 5, -4), (1, 12, -7))


class CacheCase(Budget):
    """`plug`: the cache, with room for `N` tokens or for what it keeps. `must_keep` and `may_keep`: of the tokens up to
    `last`, those a query there is to find, and those it may find. `close`: how far a stored number may be off, as a
    share of the largest of its token and head."""

    plug: ClassVar[Any]
    close: ClassVar[float] = 0.0
    PROGRAMS: ClassVar[int] = 2

    def must_keep(self, last: int) -> set[int]:
        return set(range(last + 1))

    def may_keep(self, last: int) -> set[int]:
        return self.must_keep(last)

    @once
    def text(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, values and index. A token's keys and values are found by row and index."""
        rng = np.random.default_rng(0)
        k, v = (rng.normal(size=(2, N, HEADS, WIDTH)).astype(np.float32) for _ in range(2))
        index = np.stack([np.arange(N), np.r_[[-1] * LEFT, : N - LEFT - RIGHT, [-1] * RIGHT]]).astype(np.int32)
        return k, v, index

    @once
    def read(self) -> list[tuple[list[Any], Any]]:
        """Of the second program, pieces behind the first are drafted, with wrong tokens among them, and committed."""
        made = [model.stored(self.plug, pieces, HEADS, WIDTH, drafted=i > 0) for i, pieces in enumerate(SPLITS)]
        return [run(*self.text) for run in made]

    def _check(self, row: int, last: int, first: int, k: Any, v: Any, index: Any) -> None:
        """What the tokens `first` … `last` of a row see: every key that one of them needs, once, and its values."""
        keys, values, known = self.text
        live = np.flatnonzero(index >= 0)
        found = [int(i) for i in index[live]]
        assert len(set(found)) == len(found)
        needed = set().union(*(self.must_keep(t) for t in range(first, last + 1)))
        allowed = set().union(*(self.may_keep(t) for t in range(max(first - 1, 0), last + 1)), range(first, last + 1))
        if last >= 0:
            assert needed <= set(found) <= allowed, (row, last)
        for slot, i in zip(live, found, strict=True):
            (at,) = np.flatnonzero(known[row] == i)
            for got, want in ((k[slot], keys[row, at]), (v[slot], values[row, at])):
                off = np.abs(got - want) - self.close * np.abs(want).max(-1, keepdims=True)
                assert (off <= 1e-6 * (self.close > 0)).all()

    def test_what_is_read_is_what_was_written(self) -> None:
        for pieces, (seen, _) in zip(SPLITS, self.read, strict=True):
            at = 0
            for n, got in zip(pieces, seen, strict=True):
                if got is None:
                    at += n
                    continue
                steps = [got] if n > 0 else [tuple(x[i] for x in got) for i in range(-n)]
                size = n if n > 0 else 1
                for k, v, index in steps:
                    for row in range(2):
                        new = self.text[2][row, at : at + size]
                        last = int(self.text[2][row, : at + size].max())
                        first = int(new[new >= 0].min()) if (new >= 0).any() else last
                        self._check(row, last, first, *(np.asarray(x[row]) for x in (k, v, index)))
                    at += size
            assert at == N

    def test_where_a_text_is_cut_does_not_matter(self) -> None:
        """The last token finds the same keys and values; a committed path is the same as reading it."""
        (_, one), (_, other) = self.read
        for row in range(2):
            kept = []
            for k, v, index in (one, other):
                live = np.flatnonzero(np.asarray(index[row]) >= 0)
                order = live[np.argsort(np.asarray(index[row])[live])]
                kept.append([np.asarray(x[row])[order] for x in (index, k, v)])
            for a, b in zip(*kept, strict=True):
                np.testing.assert_array_equal(a, b)
