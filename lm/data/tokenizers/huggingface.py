"""Tokenizers of the library `tokenizers`: ``tokenizer.json``."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lm.data.tokenizers.base import Tokenizer
from lm.errors import UserError

if TYPE_CHECKING:
    import tokenizers

ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # how files that do not say so name the end of a document
PROBES = ("a", "0", " ", "e", "the")  # texts of at least one token, whatever the vocabulary


@dataclass(frozen=True)
class HFTokenizer(Tokenizer):
    """A ``tokenizers.Tokenizer``."""

    inner: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: ids may have gaps, and it is the largest that needs a row."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def base_size(self) -> int:
        return 1 + max(self.inner.get_vocab(with_added_tokens=False).values(), default=-1)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(made.ids) for made in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        made = self.inner.encode(text, add_special_tokens=False)
        start, stop = np.array(made.offsets, np.int64).reshape(-1, 2).T
        ranges = []
        for a, b in spans:
            # White space alone may have been trimmed to nothing, behind where it was.
            held = np.flatnonzero(np.where(start == stop, (start > a) & (start <= b), (start < b) & (stop > a)))
            ranges.append((int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0))
        return list(made.ids), ranges

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=False))

    def token(self, i: int) -> str:
        return str(self.inner.id_to_token(i))

    def find(self, token: str) -> int | None:
        found = self.inner.token_to_id(token)
        return None if found is None else int(found)

    def is_special(self, i: int) -> bool:
        return i in self._specials

    @functools.cached_property
    def _specials(self) -> frozenset[int]:
        return frozenset(i for i, token in self.inner.get_added_tokens_decoder().items() if token.special)

    def save(self, folder: Path) -> dict[str, object]:
        self.inner.save(str(folder / "tokenizer.json"))
        return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def from_json(path: Path, bos_id: int | None = None, eos_id: int | None = None) -> HFTokenizer:
    """The tokenizer in a ``tokenizer.json``; `UserError` when the file is none.

    Truncation and padding that the file carries along are those of whoever saved it, and are not obeyed.
    """
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception for anything it cannot parse
        raise UserError(f"{path}: not a tokenizer ({e})") from None
    inner.no_truncation()
    inner.no_padding()
    return HFTokenizer(inner, bos_id, eos_id, *_around(inner))


def _around(inner: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and behind a text."""
    for probe in PROBES:
        plain = inner.encode(probe, add_special_tokens=False).ids
        if plain:
            whole = inner.encode(probe, add_special_tokens=True).ids
            for i in range(len(whole) - len(plain) + 1):
                if whole[i : i + len(plain)] == plain:
                    return tuple(whole[:i]), tuple(whole[i + len(plain) :])
    return (), ()
