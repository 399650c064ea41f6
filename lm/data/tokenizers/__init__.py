"""Tokenizers: bytes, ``tokenizer.json``, SentencePiece models, and the vocabulary inside a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lm.errors import UserError, unknown


class Tokenizer(Protocol):
    """Text to ids and back. All ids are below `vocab_size`; `identity` is a content hash of what determines them."""

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
    """UTF-8 bytes as ids 0 … 255, then bos and eos, each of which may be None."""

    bos_id: int | None = 256
    eos_id: int | None = 257

    @property
    def vocab_size(self) -> int:
        return 1 + max([255, *(i for i in (self.bos_id, self.eos_id) if i is not None)])

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
        """One more than the largest id: ids may have gaps, and it is the largest that needs a row."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=False))


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A ``.model`` file of the `sentencepiece` library. Nothing is added on encoding: no bos, no eos."""

    inner: Any
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


def from_directory(folder: Path, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer | None:
    """The tokenizer of ``tokenizer.json``, else of ``tokenizer.model``; None when there is neither file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        path = folder / "tokenizer.model"
        return from_sentencepiece(path, bos_id, eos_id) if path.is_file() else None
    return from_json(path, bos_id, eos_id)


def from_json(path: Path, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``; `UserError` when the file is none."""
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception for anything it cannot parse
        raise UserError(f"{path}: not a tokenizer ({e})") from None
    return HFTokenizer(inner, bos_id, eos_id)


def from_sentencepiece(path: Path, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
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


UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # numbers of ``tokenizer.ggml.token_type``
# ``tokenizer.ggml.pre`` -> digits of one token where text is cut by GPT-4's rule of words; None: by GPT-2's rule
CUTS = {"default": None, "gpt-2": None, "smollm": None, "llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}


def from_gguf(field: Callable[..., Any], file: str) -> Tokenizer | None:
    """The vocabulary in a GGUF file's metadata; `field(key)` gives a value or None. None when there is none.

    Byte-level BPE (kind ``gpt2``) and SentencePiece's BPE (kind ``llama``); `UserError` for others and damaged tables.
    """
    kind, tokens = field("tokenizer.ggml.model"), field("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise unknown(f"{file} tokenizer.ggml.model", kind, ("gpt2", "llama"))
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{file} tokenizer.ggml.tokens: {len(tokens)} tokens, of which {len(set(tokens))} differ")
    types = field("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{file} tokenizer.ggml.token_type: {len(types)} found, {len(tokens)} needed")
    from tokenizers import AddedToken

    try:
        inner = _byte_bpe(field, file, tokens) if kind == "gpt2" else _sentencepiece_bpe(field, file, tokens, types)
    except UserError:
        raise
    except Exception as e:  # the library raises bare Exception for merges of unknown tokens and the like
        raise UserError(f"{file}: the tokenizer in its metadata cannot be built ({e})") from None
    for number, special in ((CONTROL, True), (USER_DEFINED, False)):
        named = [t for t, c in zip(tokens, types, strict=True) if c == number]
        inner.add_tokens([AddedToken(t, special=special, normalized=False) for t in named])
    return HFTokenizer(inner, field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id"))


def _byte_bpe(field: Callable[..., Any], file: str, tokens: list[str]) -> Any:
    from tokenizers import Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as Inner
    from tokenizers import pre_tokenizers as cut

    pre = field("tokenizer.ggml.pre") or "default"
    if pre not in CUTS:
        raise unknown(f"{file} tokenizer.ggml.pre", pre, CUTS)
    merges = [tuple(m.split(" ", 1)) for m in field("tokenizer.ggml.merges") or ()]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token whole, even where no sequence of merges leads to it.
    inner = Inner(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    digits = CUTS[pre]
    steps: list[Any] = [cut.Digits(individual_digits=True)] if pre == "smollm" else []
    if digits:
        contractions, words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
        others, spaces = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
        rule = Regex("|".join((contractions, words, digits, others, spaces)))
        steps.append(cut.Split(rule, behavior="isolated"))
    steps.append(cut.ByteLevel(add_prefix_space=False, use_regex=not digits))
    inner.pre_tokenizer = cut.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    return inner


def _sentencepiece_bpe(field: Callable[..., Any], file: str, tokens: list[str], types: list[int]) -> Any:
    """SentencePiece's BPE joins the pair whose union has the best score, so scores are merges in another form."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers

    scores = field("tokenizer.ggml.scores") or ()
    if len(scores) != len(tokens):
        raise UserError(f"{file} tokenizer.ggml.scores: {len(scores)} found, {len(tokens)} needed")
    vocab = {token: i for i, token in enumerate(tokens)}
    plain = {t: s for t, s, c in zip(tokens, scores, types, strict=True) if c not in (UNKNOWN, CONTROL, USER_DEFINED)}
    merges = []
    for token in sorted(plain, key=lambda t: -plain[t]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [p for p in pairs if p[0] in plain and p[1] in plain]
        merges += sorted(found, key=lambda p: (vocab[p[0]], vocab[p[1]]))
    unk = next((t for t, c in zip(tokens, types, strict=True) if c == UNKNOWN), None)
    inner = Inner(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = field("tokenizer.ggml.add_space_prefix") is not False
    space = "\u2581"
    before = [normalizers.Prepend(space)] if prefix else []
    inner.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", space)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *after],
    )
    return inner


def check_vocab(tokenizer: Tokenizer, config: Any) -> None:
    """Refuses a tokenizer that can emit ids the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer: {tokenizer.vocab_size} ids, the model has model.vocab_size = {config.vocab_size}: "
            "foreign vocabulary; give the tokenizer the checkpoint was trained with"
        )
