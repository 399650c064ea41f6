"""Tensors of safetensors files, read one at a time, large ones in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

import lm.interop.readers.tensors as tensors
from lm.errors import UserError

# How safetensors names what a weight may be stored as.
FLOATS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BYTES = {"F64": 8, "F32": 4}  # others: 2
PIECE = 4 << 20  # bytes of a tensor at a time
WINDOW = 16 << 20  # bytes of a file that stay in memory


class _Open:
    """A file, mapped to memory. What was read of a mapping stays resident, so it is made again now and then."""

    def __init__(self, file: Path) -> None:
        self.file, self.done = file, 0
        self.handle = self._opened()

    def _opened(self) -> Any:
        try:
            return safetensors.safe_open(str(self.file), framework="numpy")
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f"{self.file}: not a complete safetensors file ({e})") from None

    def rows(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Some rows of a tensor, a copy; all of it without `start`."""
        if self.done > WINDOW:
            self.handle, self.done = None, 0
            self.handle = self._opened()
        try:
            if start is None:
                found = np.asarray(self.handle.get_tensor(name))
            else:
                found = np.asarray(self.handle.get_slice(name)[start:stop])
        except (safetensors.SafetensorError, ValueError, TypeError) as e:
            raise UserError(f"{self.file}: tensor {name!r} cannot be read ({e})") from None
        self.done += found.nbytes
        return found


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    opened: _Open
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.opened.handle.get_slice(self.name).get_shape())

    def kind(self) -> str:
        return str(self.opened.handle.get_slice(self.name).get_dtype())

    def check(self) -> None:
        """Raises `UserError` for a tensor that is not stored as floating point numbers, constants aside."""
        if self.kind() not in FLOATS and not tensors.BUFFERS.search(self.name):
            raise UserError(
                f"{self.opened.file}: tensor {self.name!r} is stored as {self.kind()}, a quantised form that needs "
                f"scales; valid: {', '.join(FLOATS)}"
            )

    def array(self) -> np.ndarray:
        return self.opened.rows(self.name)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]] | None:
        """(first row, some rows) of a matrix; None for anything else."""
        shape = self.shape
        if len(shape) != 2 or not all(shape):
            return None
        step = max(1, PIECE // (shape[1] * BYTES.get(self.kind(), 2)))
        return ((i, self.opened.rows(self.name, i, min(i + step, shape[0]))) for i in range(0, shape[0], step))

    def equals(self, other: Stored) -> bool:
        """Whether both hold the same numbers."""
        if self.shape != other.shape:
            return False
        ours, theirs = self.pieces(), other.pieces()
        if ours is None or theirs is None:
            return np.array_equal(self.array(), other.array())
        step = zip(ours, theirs, strict=False)  # pieces of another type have other sizes
        if self.kind() == other.kind():
            return all(np.array_equal(a, b) for (_, a), (_, b) in step)
        return np.array_equal(self.array(), other.array())


def stored_in(file: Path) -> list[Stored]:
    """All tensors of a file. Raises `UserError` for one that is damaged."""
    opened = _Open(file)
    return [Stored(opened, name) for name in opened.handle.keys()]  # noqa: SIM118 (no mapping)
