"""Tokenizers: bytes, ``tokenizer.json``, and the vocabulary inside a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lm.errors import UserError, unknown


class Tokenizer(Protocol):
    """Text to ids and back. `identity` is a content hash of everything that determines the ids."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def identity(self) -> str: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0 … 255, then bos and eos."""

    bos_id: int | None = 256
    eos_id: int | None = 257

    @property
    def vocab_size(self) -> int:
        return 258

    @property
    def identity(self) -> str:
        return "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class HFTokenizer:
    """A ``tokenizers.Tokenizer``. Nothing is added on encoding: no bos, no eos."""

    inner: Any
    bos_id: int | None = None
    eos_id: int | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=False))


def from_directory(folder: Path, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer | None:
    """The tokenizer of ``folder/tokenizer.json``; None when there is no such file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception for anything it cannot parse
        raise UserError(f"{path}: not a tokenizer ({e})") from None
    return HFTokenizer(inner, bos_id, eos_id)


def from_gguf(field: Callable[..., Any], file: str) -> Tokenizer | None:
    """The byte-level BPE in a GGUF file's metadata; `field(key)` gives a value or None. None when there is none."""
    kind, tokens = field("tokenizer.ggml.model"), field("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    if kind != "gpt2":
        raise unknown(f"{file} tokenizer.ggml.model", kind, ("gpt2",))
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    merges = [tuple(m.split(" ", 1)) for m in field("tokenizer.ggml.merges") or ()]
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = Inner(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pre = field("tokenizer.ggml.pre") or "default"
    if pre in ("smollm", "default", "gpt-2"):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        inner.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    else:
        raise unknown(f"{file} tokenizer.ggml.pre", pre, ("smollm", "default", "gpt-2"))
    inner.decoder = decoders.ByteLevel()
    control = field("tokenizer.ggml.token_type") or ()
    inner.add_special_tokens([AddedToken(t, special=True) for t, c in zip(tokens, control, strict=False) if c == 3])
    return HFTokenizer(inner, field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id"))


def check_vocab(tokenizer: Tokenizer, config: Any) -> None:
    """Refuses a tokenizer that can emit ids the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer: {tokenizer.vocab_size} ids, the model has model.vocab_size = {config.vocab_size}: "
            "foreign vocabulary; give the tokenizer the checkpoint was trained with"
        )
