"""Rows of next-token prediction by the generic suite: one stream cut, and whole pieces fitted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cases.rows_case import Row, RowsCase

from lm.data.corpus import Corpus
from lm.data.packing import Packed, split_row

T = 16


class _Packed(RowsCase):
    mode = ""

    def rows(self, documents: list[list[int]]) -> Sequence[Row]:
        offsets = np.cumsum([0, *map(len, documents)])
        tokens = np.array([token for document in documents for token in document], np.int32)
        lengths = np.array([len(document) for document in documents])
        names = tuple(str(i) for i in range(len(documents)))
        packed = Packed(Corpus(tokens, offsets, lengths, names, "test"), T, self.mode)
        return [split_row(packed[i]) for i in range(len(packed))]


class TestConcat(_Packed):
    mode = "concat"


class TestBestFit(_Packed):
    mode = "best_fit"
