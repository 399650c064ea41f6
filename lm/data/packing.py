"""Rows of fixed length from documents of any: by cutting one stream, or by fitting whole pieces."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import numpy as np

from lm.data.corpus import Corpus
from lm.errors import UserError, unknown

MODES = ("concat", "best_fit")


class Packed:
    """``p[i] -> {"tokens": int32[T + 1], "segments": int32[T + 1]}``, random access over ``len(p)`` rows.

    Segments count the row's documents from 1; 0 is padding, at the end. ``concat`` cuts the stream of all documents
    every T tokens; ``best_fit`` cuts documents into pieces of at most T + 1 tokens and puts every piece, whole, where
    it leaves the least room (best fit decreasing, arXiv 2404.10830). Neighbours of a cut share one token, so that in
    both every token but a document's first is a target exactly once. Raises `UserError` for fewer than T + 1 tokens,
    and for documents of single tokens only.
    """

    def __init__(self, corpus: Corpus, seq_len: int, mode: str = "concat") -> None:
        if mode not in MODES:
            raise unknown("train.data.packing", mode, MODES)
        if corpus.n_tokens < seq_len + 1:
            raise UserError(
                f"train.data.seq_len: {seq_len} tokens asked for, the text has {corpus.n_tokens} in all; "
                "valid: a shorter seq_len or more text"
            )
        self.corpus, self.seq_len, self.mode = corpus, seq_len, mode
        # A document's first token has nothing to be predicted from.
        self.n_targets = corpus.n_tokens - int(np.count_nonzero(np.diff(corpus.offsets)))
        if self.n_targets == 0:
            raise UserError(f"train.data.texts: none of the {len(corpus)} documents is longer than one token")
        rows = _concat(corpus.offsets, seq_len) if mode == "concat" else _best_fit(corpus.offsets, seq_len)
        # Pieces of row i: (start, stop) in the stream, pieces[first[i]:first[i + 1]].
        self._pieces, self._first = rows
        self.identity = f"{corpus.identity} {seq_len} {mode}"

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Row `i`; of a corpus with answers also ``answers``, float32, 1 for tokens to be predicted."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        size = self.seq_len + 1
        tokens, segments, at = np.zeros(size, np.int32), np.zeros(size, np.int32), 0
        answers = None if self.corpus.answers is None else np.zeros(size, np.float32)
        for n, (start, stop) in enumerate(self._pieces[self._first[i] : self._first[i + 1]]):
            tokens[at : at + stop - start] = self.corpus.tokens[start:stop]
            segments[at : at + stop - start] = n + 1
            if answers is not None and self.corpus.answers is not None:
                answers[at : at + stop - start] = self.corpus.answers[start:stop]
            at += stop - start
        row = {"tokens": tokens, "segments": segments}
        return row if answers is None else {**row, "answers": answers}

    @property
    def n_bytes(self) -> float:
        """UTF-8 bytes that the targets stand for, every token (a document's eos is one) for as many as any other."""
        return float(self.corpus.n_bytes.sum()) * self.n_targets / self.corpus.n_tokens

    @property
    def fill(self) -> float:
        """The share of all places that hold a token."""
        held = int((self._pieces[:, 1] - self._pieces[:, 0]).sum())
        return held / (len(self) * (self.seq_len + 1))


def _concat(offsets: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Row i is the stream from ``i T`` to ``(i + 1) T``, inclusive, in pieces that end with their document."""
    total = int(offsets[-1])
    cuts = np.arange(0, total - 1, T, dtype=np.int64)
    ends = np.minimum(cuts + T + 1, total)
    starts = np.unique(offsets[:-1])
    # A row is cut where documents start inside it: at starts[low:high]. One on the shared token is in both rows.
    low, high = np.searchsorted(starts, cuts, "right"), np.searchsorted(starts, ends, "left")
    first = np.concatenate([[0], np.cumsum(1 + high - low)]).astype(np.int64)
    inner = starts[_ranges(low, high)]
    begins = np.insert(inner, first[:-1] - np.arange(len(cuts)), cuts)
    stops = np.insert(inner, first[1:] - np.arange(1, len(cuts) + 1), ends)
    return np.stack([begins, stops], axis=1), first


def _ranges(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """``low[0], …, high[0] - 1, low[1], …, high[1] - 1, …``"""
    n = high - low
    return np.arange(n.sum(), dtype=np.int64) + np.repeat(low - (np.cumsum(n) - n), n)


def _best_fit(offsets: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest pieces first, each into the open row with the least room that still takes it."""
    a, b = offsets[:-1], offsets[1:]
    count = np.maximum(-(-(b - a - 1) // T), 0)  # a single token is no target and no context
    begins = np.repeat(a, count) + T * _ranges(np.zeros_like(count), count)
    stops = np.minimum(begins + T + 1, np.repeat(b, count))
    order = np.lexsort((begins, begins - stops))
    pieces = np.stack([begins, stops], axis=1)[order]
    row = np.array(_rows_of((pieces[:, 1] - pieces[:, 0]).tolist(), T + 1), np.int64)
    # Rows in the order of the text, not of their fill: whoever reads only some of them reads no easier part.
    opening = pieces[np.unique(row, return_index=True)[1], 0]
    row = np.argsort(np.argsort(opening))[row]
    first = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64)
    return pieces[np.argsort(row, kind="stable")], first


def _rows_of(lengths: Iterable[int], size: int) -> list[int]:
    """The row of each piece. Open rows are kept by their room, of which there are at most `size` sorts."""
    rooms: list[int] = []  # that some open row has, ascending
    open_rows: dict[int, list[int]] = {}
    out, opened = [], 0
    for n in lengths:
        k = bisect.bisect_left(rooms, n)
        if k == len(rooms):
            row, left = opened, size - n
            opened += 1
        else:
            room = rooms[k]
            row, left = open_rows[room].pop(), room - n
            if not open_rows[room]:
                del rooms[k], open_rows[room]
        out.append(row)
        if left > 1:
            if left not in open_rows:
                bisect.insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return out


def split_row(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the objective takes, each ``[T]``: int32 `inputs`, `targets` (the next token), `segments` and `index` (from
    0 in every segment, -1 for padding); float32 `weights`, 1 where input and target are of one document, but 0 for a
    target that is not to be predicted."""
    tokens, segments = row["tokens"], row["segments"]
    at = np.arange(len(tokens), dtype=np.int32)
    new = np.concatenate([[True], segments[1:] != segments[:-1]])
    index = np.where(segments > 0, at - np.maximum.accumulate(np.where(new, at, 0)), -1).astype(np.int32)
    weights = ((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32)
    if "answers" in row:
        weights = weights * row["answers"][1:]
    return {
        "inputs": tokens[:-1],
        "targets": tokens[1:],
        "weights": weights,
        "segments": segments[:-1],
        "index": index[:-1],
    }
