"""Tokenizers of the library `sentencepiece`: ``.model`` files."""

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
    from sentencepiece import SentencePieceProcessor


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A ``SentencePieceProcessor``."""

    inner: SentencePieceProcessor
    bos_id: int | None = None
    eos_id: int | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.inner.vocab_size())

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.inner.serialized_model_proto()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids)))

    def with_own_end(self) -> SentencePieceTokenizer:
        end = int(self.inner.eos_id())
        return dataclasses.replace(self, eos_id=end if end >= 0 else None)

    def save(self, folder: Path, chat_template: str | None = None) -> None:
        (folder / "tokenizer.model").write_bytes(self.inner.serialized_model_proto())
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        special = {key: self.inner.id_to_piece(i) for key, i in ids.items() if i is not None}
        write_config(folder, {"tokenizer_class": "LlamaTokenizer"}, special, chat_template)


def from_sentencepiece(path: Path, bos_id: int | None = None, eos_id: int | None = None) -> SentencePieceTokenizer:
    """The tokenizer in a SentencePiece file; `UserError` when the file is none, or the library is not installed."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"{path}: reading it needs the library sentencepiece; get it with: pip install 'decoder-lab[data]'"
        ) from None
    inner = sentencepiece.SentencePieceProcessor()
    try:
        inner.LoadFromSerializedProto(path.read_bytes())
        inner.vocab_size()
    except Exception as e:  # whatever parsing a foreign file ends in
        raise UserError(f"{path}: not a SentencePiece model ({e})") from None
    return SentencePieceTokenizer(inner, bos_id, eos_id)
