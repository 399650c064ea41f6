"""The tests every way of making rows owes, in NumPy alone: what is an input, what a target, and what nobody's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

Row = dict[str, np.ndarray]


class RowsCase:
    """`rows`: every row of the `documents`, ``[T]`` each: inputs, targets, weights, segments, index."""

    def documents(self) -> list[list[int]]:
        """Texts of different lengths, no token of them twice, so that every place in a row is recognised."""
        rng, out, at = np.random.default_rng(0), [], 1
        for n in rng.integers(1, 30, 12):
            out.append(list(range(at, at + int(n))))
            at += int(n)
        return out

    def rows(self, documents: list[list[int]]) -> Sequence[Row]:
        raise NotImplementedError

    def counted(self, documents: list[list[int]]) -> dict[int, int]:
        """How often each token is to be a target; here: once, but for the first of a document."""
        return {token: 1 for document in documents for token in document[1:]}

    def test_a_target_is_the_next_token_of_its_document(self) -> None:
        documents = self.documents()
        after = {a: b for document in documents for a, b in itertools.pairwise(document)}
        for row in self.rows(documents):
            assert len({len(x) for x in row.values()}) == 1
            for t in np.flatnonzero(row["weights"] > 0):
                assert after[int(row["inputs"][t])] == int(row["targets"][t])

    def test_every_token_is_trained_as_often_as_said(self) -> None:
        documents = self.documents()
        seen: dict[int, int] = {}
        for row in self.rows(documents):
            for t in np.flatnonzero(row["weights"] > 0):
                token = int(row["targets"][t])
                seen[token] = seen.get(token, 0) + 1
        assert seen == self.counted(documents)

    def test_an_index_counts_within_its_segment(self) -> None:
        """From 0, one by one; padding is -1, bears no weight, and lies behind all tokens."""
        for row in self.rows(self.documents()):
            index, segments = row["index"], row["segments"]
            for t, i in enumerate(index):
                new = t == 0 or segments[t] != segments[t - 1]
                assert i == -1 or i == (0 if new else index[t - 1] + 1)
            padding = index < 0
            assert not row["weights"][padding].any()
            assert not (np.diff(padding.astype(int)) < 0).any()

    def test_documents_of_a_row_are_told_apart(self) -> None:
        """Tokens of one segment are one document's, side by side."""
        documents = self.documents()
        of = {token: i for i, document in enumerate(documents) for token in document}
        for row in self.rows(documents):
            live = np.flatnonzero(row["index"] >= 0)
            for a, b in itertools.pairwise(live):
                same = row["segments"][a] == row["segments"][b]
                assert not same or of[int(row["inputs"][a])] == of[int(row["inputs"][b])]
