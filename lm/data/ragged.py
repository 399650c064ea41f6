"""Rows of different lengths in one array, and parts of arrays that stay where they are, for example on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

_BLOCK = 2**14  # names that are read at a time


class Spliced:
    """Runs of one-dimensional arrays, one behind the other; a slice reads what it covers and no more.

    Run r is ``arrays[which[r]][starts[r]:stops[r]]``, each int64 ``[R]``.
    """

    def __init__(self, arrays: Sequence[Array], which: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        some = stops > starts
        self._arrays, self._which, self._starts = list(arrays), which[some], starts[some]
        self._ends = np.cumsum((stops - starts)[some], dtype=np.int64)
        self.dtype: np.dtype[Any] = np.result_type(*(a.dtype for a in arrays))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, at: slice) -> np.ndarray:
        start, stop, step = at.indices(len(self))
        if step != 1:
            raise ValueError(f"a step of {step}; valid: 1")
        if stop <= start:
            return np.zeros(0, self.dtype)
        first, last = np.searchsorted(self._ends, start, "right"), np.searchsorted(self._ends, stop, "left")
        parts = []
        for r in range(int(first), int(last) + 1):
            begins = int(self._ends[r - 1]) if r else 0
            shift = int(self._starts[r]) - begins
            run = self._arrays[self._which[r]]
            parts.append(np.asarray(run[max(start, begins) + shift : min(stop, int(self._ends[r])) + shift]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype)

    def tolist(self) -> list[int]:
        return list(self[:].tolist())


Array = np.ndarray | Spliced


def rows(values: Array, offsets: np.ndarray, which: np.ndarray, longest: int | None = None) -> Spliced:
    """Rows `which` (their numbers) of those that ``values[offsets[i]:offsets[i + 1]]`` are, one behind the other; of
    each the first `longest` values (None = all)."""
    if longest is not None:
        starts, stops = np.asarray(offsets[which]), np.asarray(offsets[which + 1])
        return Spliced([values], np.zeros(len(which), np.int64), starts, np.minimum(stops, starts + longest))
    new = np.concatenate([[True], np.diff(which) != 1]) if len(which) else np.zeros(0, bool)
    last = np.concatenate([new[1:], [True]]) if len(which) else new
    starts, stops = np.asarray(offsets[which[new]]), np.asarray(offsets[which[last] + 1])
    return Spliced([values], np.zeros(len(starts), np.int64), starts, stops)


def joined(arrays: Sequence[Array]) -> Spliced:
    """All of the arrays, one behind the other."""
    lengths = np.array([len(a) for a in arrays], np.int64)
    return Spliced(arrays, np.arange(len(arrays)), np.zeros_like(lengths), lengths)


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where rows of these lengths begin, and where the last ends: int64 ``[n + 1]``."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


class Names(Sequence[str]):
    """Strings, as the UTF-8 bytes of all of them: uint8, string i at ``values[offsets[i]:offsets[i + 1]]``."""

    def __init__(self, values: Array, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The same without a Python object for each."""
        if isinstance(names, Names):
            return names
        data, lengths = bytearray(), list[np.ndarray]()
        for block in blocks(names, _BLOCK):
            coded = [encoded(name) for name in block]
            data += b"".join(coded)
            lengths.append(np.array([len(c) for c in coded], np.int64))
        offsets = offsets_of(np.concatenate(lengths) if lengths else [])
        return cls(np.frombuffer(bytes(data), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return _decoded(self.values[int(self.offsets[i]) : int(self.offsets[i + 1])].tobytes())

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _BLOCK):
            ends = np.asarray(self.offsets[first : first + _BLOCK + 1])
            data = self.values[int(ends[0]) : int(ends[-1])].tobytes()
            for a, b in zip((ends[:-1] - ends[0]).tolist(), (ends[1:] - ends[0]).tolist(), strict=True):
                yield _decoded(data[a:b])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, which: np.ndarray) -> Names:
        """Those of the numbers `which`, in that order."""
        return Names(rows(self.values, self.offsets, which), offsets_of(np.diff(self.offsets)[which]))


def encoded(name: str) -> bytes:
    """How `Names` keeps a string."""
    return name.encode("utf-8", "surrogatepass")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def blocks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` items, the last shorter."""
    block = list[str]()
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
