"""Tokenizers of the library `tokenizers`: ``tokenizer.json``."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lm.data.tokenizers.base import Tokenizer, write_config
from lm.errors import UserError

if TYPE_CHECKING:
    import tokenizers

ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # how files name the end of a document


@dataclass(frozen=True)
class HFTokenizer(Tokenizer):
    """A ``tokenizers.Tokenizer``."""

    inner: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: ids may have gaps, and it is the largest that needs a row."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=False))

    def with_own_end(self) -> HFTokenizer:
        for token in ENDS:
            end = self.inner.token_to_id(token)
            if end is not None:
                return dataclasses.replace(self, eos_id=end)
        return self

    def save(self, folder: Path, chat_template: str | None = None) -> None:
        self.inner.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        special = {key: self.inner.id_to_token(i) for key, i in ids.items() if i is not None}
        write_config(folder, settings, special, chat_template)


def from_json(path: Path, bos_id: int | None = None, eos_id: int | None = None) -> HFTokenizer:
    """The tokenizer in a ``tokenizer.json``; `UserError` when the file is none."""
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception for anything it cannot parse
        raise UserError(f"{path}: not a tokenizer ({e})") from None
    return HFTokenizer(inner, bos_id, eos_id)
