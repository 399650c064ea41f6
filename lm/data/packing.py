"""Rows of fixed length from documents of any: by cutting one stream, or by fitting whole pieces."""

from __future__ import annotations

import bisect
import itertools

import numpy as np

from lm.data.corpus import Corpus
from lm.errors import UserError, unknown

MODES = ("concat", "best_fit")


class Packed:
    """``p[i] -> {"tokens": int32[T + 1], "segments": int32[T + 1]}``, random access over ``len(p)`` rows.

    Segments count the row's documents from 1; 0 is padding, at the end. ``concat`` cuts the stream of all documents
    every T tokens; ``best_fit`` cuts documents into pieces of at most T + 1 tokens and puts every piece, whole, where
    it leaves the least room (best fit decreasing, arXiv 2404.10830). Neighbours of a cut share one token, so that in
    both every token but a document's first is a target exactly once. Raises `UserError` for fewer than T + 1 tokens.
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
        rows = _concat(corpus.offsets, seq_len) if mode == "concat" else _best_fit(corpus.offsets, seq_len)
        # Pieces of row i: (start, stop) in the stream, pieces[first[i]:first[i + 1]].
        self._pieces, self._first = rows
        self.identity = f"{corpus.identity} {seq_len} {mode}"

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        size = self.seq_len + 1
        tokens, segments, at = np.zeros(size, np.int32), np.zeros(size, np.int32), 0
        for n, (start, stop) in enumerate(self._pieces[self._first[i] : self._first[i + 1]]):
            tokens[at : at + stop - start] = self.corpus.tokens[start:stop]
            segments[at : at + stop - start] = n + 1
            at += stop - start
        return {"tokens": tokens, "segments": segments}

    @property
    def fill(self) -> float:
        """The share of all places that hold a token."""
        held = int((self._pieces[:, 1] - self._pieces[:, 0]).sum())
        return held / (len(self) * (self.seq_len + 1))


def _concat(offsets: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Row i is the stream from ``i T`` to ``(i + 1) T``, inclusive, in pieces that end with their document."""
    total = int(offsets[-1])
    cuts = np.arange(0, max(total - 1, 1), T)
    ends = np.minimum(cuts + T + 1, total)
    pieces, first = [], [0]
    starts = offsets[:-1]
    for a, b in zip(cuts.tolist(), ends.tolist(), strict=True):
        inner = starts[np.searchsorted(starts, a, "right") : np.searchsorted(starts, b, "left")]
        edges = [a, *(int(x) for x in np.unique(inner)), b]
        pieces += list(itertools.pairwise(edges))
        first.append(len(pieces))
    return np.array(pieces, np.int64).reshape(-1, 2), np.array(first, np.int64)


def _best_fit(offsets: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest pieces first, each into the open row with the least room that still takes it."""
    pieces = []
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        while b - a > 1:  # a single token is no target and no context
            pieces.append((a, min(a + T + 1, b)))
            a += T
    pieces.sort(key=lambda p: (p[0] - p[1], p[0]))
    room: list[int] = []  # rooms that some open row has, ascending
    open_rows: dict[int, list[int]] = {}
    rows: list[list[tuple[int, int]]] = []
    for piece in pieces:
        n = piece[1] - piece[0]
        k = bisect.bisect_left(room, n)
        if k == len(room):
            row, left = len(rows), T + 1 - n
            rows.append([piece])
        else:
            size = room[k]
            row, left = open_rows[size].pop(), size - n
            if not open_rows[size]:
                room.pop(k)
                del open_rows[size]
            rows[row].append(piece)
        if left > 1:
            if left not in open_rows:
                bisect.insort(room, left)
                open_rows[left] = []
            open_rows[left].append(row)
    rows.sort()
    first = np.cumsum([0, *(len(r) for r in rows)]).astype(np.int64)
    return np.array([p for r in rows for p in r], np.int64).reshape(-1, 2), first


def split_row(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the objective takes, each ``[T]``: int32 `inputs`, `targets` (the next token), `segments` and `index` (from
    0 in every segment, -1 for padding); float32 `weights`, 1 where input and target are of one document."""
    tokens, segments = row["tokens"], row["segments"]
    at = np.arange(len(tokens), dtype=np.int32)
    new = np.concatenate([[True], segments[1:] != segments[:-1]])
    index = np.where(segments > 0, at - np.maximum.accumulate(np.where(new, at, 0)), -1).astype(np.int32)
    return {
        "inputs": tokens[:-1],
        "targets": tokens[1:],
        "weights": ((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32),
        "segments": segments[:-1],
        "index": index[:-1],
    }
