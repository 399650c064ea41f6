"""Numbers as tokens: a series divided by the mean size of its first values, then put into equal bins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.data.texts.document import Document
from lm.data.tokenizers.base import Tokenizer
from lm.errors import UserError


@dataclass(frozen=True)
class ValueTokenizer(Tokenizer):
    """Ids are bins: id j stands for `low` + (j + 1/2) (`high` - `low`) / `bins`, times the document's scale.

    The scale is the mean absolute value of the first `context` values (Chronos, arXiv 2403.07815, section 3.1), so a
    forecast from that context needs nothing else. Text is numbers between white space. Ids are ordered, hence fit heads
    over ordered bins; there is neither a bos nor an eos.
    """

    bins: int
    context: int
    low: float
    high: float
    bos_id: int | None = None
    eos_id: int | None = None

    @property
    def vocab_size(self) -> int:
        return self.bins

    @property
    def identity(self) -> str:
        return f"values {self.bins} {self.context} {self.low!r} {self.high!r}"

    def scale(self, values: np.ndarray) -> float:
        size = float(np.abs(values[: self.context]).mean())
        return size if size > 0 else 1.0

    def quantise(self, scaled: np.ndarray) -> np.ndarray:
        """Ids int64; what lies outside goes to the nearest bin."""
        place = np.floor((np.asarray(scaled) - self.low) / (self.high - self.low) * self.bins)
        return np.clip(place, 0, self.bins - 1).astype(np.int64)

    def centres(self, ids: npt.ArrayLike) -> np.ndarray:
        """Scaled values float64."""
        return self.low + (np.asarray(ids) + 0.5) * (self.high - self.low) / self.bins

    def encode(self, text: str) -> list[int]:
        values = numbers(text, "text")
        return self.quantise(values / self.scale(values)).tolist() if len(values) else []

    def decode(self, ids: Sequence[int]) -> str:
        """The scaled values: the scale itself is not among the ids."""
        return "".join(f"{v:.6g}\n" for v in self.centres(list(ids)))

    @property
    def ends_documents(self) -> bool:
        return False

    def save(self, folder: Path) -> dict[str, object]:
        """Writes nothing: no file format knows this tokenizer, and `describe` says all of it."""
        return {}

    def describe(self) -> dict[str, object]:
        return {"kind": "values", "bins": self.bins, "context": self.context, "low": self.low, "high": self.high}


def from_description(about: Mapping[str, Any]) -> ValueTokenizer:
    """The inverse of `ValueTokenizer.describe`."""
    return ValueTokenizer(int(about["bins"]), int(about["context"]), float(about["low"]), float(about["high"]))


def numbers(text: str, name: str) -> np.ndarray:
    """float64; `UserError` for a word that is no finite number."""
    try:
        out = np.array([float(word) for word in text.split()], np.float64)
    except ValueError as e:
        raise UserError(f"texts: {name}: {e}; valid for the tokenizer values:BINS:CONTEXT: numbers alone") from None
    if not np.isfinite(out).all():
        raise UserError(f"texts: {name}: holds values that are not finite")
    return out


def trained(spec: str, documents: Callable[[], Iterable[Document]]) -> ValueTokenizer:
    """``values:BINS:CONTEXT``, its range that of the scaled values of ``documents()`` and a tenth more."""
    key = "train.data.tokenizer"
    parts = spec.split(":")[1:]
    if len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise UserError(f"{key}: {spec!r}; valid: values:BINS:CONTEXT, for example values:256:144")
    bins, context = (int(p) for p in parts)
    if bins < 2 or context < 1:
        raise UserError(f"{key}: {spec!r}: at least 2 bins and a context of 1 are needed")
    unit = ValueTokenizer(bins, context, 0.0, 1.0)
    low, high = np.inf, -np.inf
    for found in (numbers(d.text, d.name) for d in documents()):
        if len(found):
            scaled = found / unit.scale(found)
            low, high = min(low, float(scaled.min())), max(high, float(scaled.max()))
    margin = 0.05 * (high - low) or 0.5
    return ValueTokenizer(bins, context, low - margin, high + margin)
