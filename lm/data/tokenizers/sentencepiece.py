"""Tokenizers of the library `sentencepiece`: ``.model`` files."""

from __future__ import annotations

import dataclasses
import functools
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

FLAGS = ("lstrip", "rstrip", "single_word")  # eats the space before it, behind it; is none inside a word


@dataclass(frozen=True, eq=False)
class SentencePieceTokenizer(Tokenizer):
    """A ``SentencePieceProcessor``, and the tokens that a checkpoint has added to it.

    `added`: spelling -> id; where a text spells one out, it is that token, and the text on either side is cut there.
    With `legacy` the text behind such a token begins as a text of its own does, with a space in front (the library's
    rule, and llama.cpp's); without, as the middle of a text (``"legacy": false`` of a Hugging Face folder). Without
    `spaced` no text begins with that space (``add_prefix_space``). `flags`: of added tokens, some of `FLAGS`.
    """

    inner: SentencePieceProcessor
    bos_id: int | None = None
    eos_id: int | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    added: Mapping[str, int] = field(default_factory=dict)
    legacy: bool = True
    spaced: bool = True
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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
        flags = sorted((token, own) for token, own in self.flags.items() if own)
        rule = b"" if self.legacy and self.spaced and not flags else repr((self.legacy, self.spaced, flags)).encode()
        return hashlib.sha256(model + (repr(added).encode() if added else b"") + rule).hexdigest()

    def encode(self, text: str) -> list[int]:
        if not self.added:
            return list(self._at(True).encode(text))
        tokens, cut = self._cut
        out, at = list[int](), 0
        for found in cut.finditer(text):
            out += self._at(at == 0).encode(text[at : found.start()])
            assert found.lastindex is not None
            out.append(self.added[tokens[found.lastindex - 1]])
            at = found.end()
        return out + self._at(at == 0).encode(text[at:])

    def _at(self, start: bool) -> SentencePieceProcessor:
        """The model for the start of a text, or for what stands behind an added token."""
        return self.inner if self.spaced and (start or self.legacy) else self._middle

    @functools.cached_property
    def _cut(self) -> tuple[list[str], re.Pattern[str]]:
        """Added tokens, long ones first, and a pattern with a group for each, in the same order."""
        tokens = sorted(self.added, key=len, reverse=True)
        return tokens, re.compile("|".join(self._pattern(token) for token in tokens))

    def _pattern(self, token: str) -> str:
        flags, out = self.flags.get(token, ()), f"({re.escape(token)})"
        if "single_word" in flags:
            out = rf"(?<!\w){out}(?!\w)"
        return ("\\s*" if "lstrip" in flags else "") + out + ("\\s*" if "rstrip" in flags else "")

    @functools.cached_property
    def _middle(self) -> SentencePieceProcessor:
        """The same model without a space in front. Of protocol buffers laid end to end the later setting counts:
        ``normalizer_spec.add_dummy_prefix = false``."""
        made = type(self.inner)()
        made.LoadFromSerializedProto(self.inner.serialized_model_proto() + b"\x1a\x02\x18\x00")
        return made

    def decode(self, ids: Sequence[int]) -> str:
        if not self.added:
            return str(self._at(True).decode(list(ids)))
        spelled = {i: token for token, i in self.added.items()}
        out, run = "", list[int]()
        for i in ids:
            if i in spelled:
                out, run = out + self._text(run, not out) + spelled[i], []
            else:
                run.append(i)
        return out + self._text(run, not out)

    def _text(self, ids: list[int], first: bool) -> str:
        return str(self._at(first).decode(ids)) if ids else ""

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
        about["legacy"] = self.legacy
        if not self.spaced:
            about["add_prefix_space"] = False
        if self.added:
            about["added_tokens_decoder"] = {
                str(i): {
                    "content": t,
                    "normalized": False,
                    "special": True,
                    **{flag: flag in self.flags.get(t, ()) for flag in FLAGS},
                }
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
