"""Tokenizers of the library `sentencepiece`: ``.model`` files."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lm.data.tokenizers.base import Tokenizer
from lm.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


@dataclass(frozen=True, eq=False)
class SentencePieceTokenizer(Tokenizer):
    """A ``SentencePieceProcessor``, and the tokens that a checkpoint has added to it.

    `added`: spelling -> id; where a text spells one out, it is that token, and the text on either side is cut there.
    """

    inner: SentencePieceProcessor
    bos_id: int | None = None
    eos_id: int | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    added: Mapping[str, int] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return max([self.base_size, *(1 + i for i in self.added.values())])

    @property
    def base_size(self) -> int:
        return int(self.inner.vocab_size())

    @property
    def identity(self) -> str:
        model = self.inner.serialized_model_proto()
        own = self.named().values()
        added = sorted((token, i) for token, i in self.added.items() if token not in own)
        return hashlib.sha256(model + (repr(added).encode() if added else b"")).hexdigest()

    def encode(self, text: str) -> list[int]:
        if not self.added:
            return list(self.inner.encode(text))
        cut = "|".join(re.escape(t) for t in sorted(self.added, key=len, reverse=True))
        out: list[int] = []
        for piece in re.split(f"({cut})", text):
            out += [self.added[piece]] if piece in self.added else self.inner.encode(piece)
        return out

    def decode(self, ids: Sequence[int]) -> str:
        if not self.added:
            return str(self.inner.decode(list(ids)))
        spelled = {i: token for token, i in self.added.items()}
        out, run = "", list[int]()
        for i in ids:
            if i in spelled:
                out, run = out + self._text(run) + spelled[i], []
            else:
                run.append(i)
        return out + self._text(run)

    def _text(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids)) if ids else ""

    def token(self, i: int) -> str:
        return next((t for t, at in self.added.items() if at == i), "") or str(self.inner.id_to_piece(i))

    def find(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        i = int(self.inner.piece_to_id(token))
        return i if self.inner.id_to_piece(i) == token else None

    def is_special(self, i: int) -> bool:
        return i in self.added.values() or (i < self.base_size and bool(self.inner.is_control(i)))

    def named(self) -> dict[str, str]:
        """The special tokens that the file itself names."""
        ids = {"bos_token": self.inner.bos_id(), "eos_token": self.inner.eos_id(), "unk_token": self.inner.unk_id()}
        return {name: str(self.inner.id_to_piece(int(i))) for name, i in ids.items() if i >= 0}

    def save(self, folder: Path) -> dict[str, object]:
        (folder / "tokenizer.model").write_bytes(self.inner.serialized_model_proto())
        about: dict[str, object] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": bool(self.before)}
        about["add_eos_token"] = bool(self.after)
        if self.added:
            about["added_tokens_decoder"] = {
                str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "special": True}
                for t, i in self.added.items()
            }
        return about


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
    made = SentencePieceTokenizer(inner, bos_id, eos_id)
    own = {token: made.find(token) for token in made.named().values()}
    return dataclasses.replace(made, added={token: i for token, i in own.items() if i is not None})
