"""Documents as one array of tokens, kept on disk by content and read through a memory map."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lm.data.texts.document import Document, identity
from lm.data.tokenizers import Tokenizer
from lm.errors import UserError

_VERSION = 2  # raise when the format or the way of tokenizing changes
_PIECE = 2**20  # characters that are tokenized at a time
_PATIENCE = 5.0  # seconds between two lines of progress


class Encoded(NamedTuple):
    """A document's ids, its UTF-8 bytes, and which of its tokens are to be predicted (None = all)."""

    ids: Sequence[int]
    n_bytes: int
    answers: Sequence[bool] | None = None


class Encoder(Protocol):
    """From documents to ids. `identity` is a line that names all that decides them; `answers` says whether only some
    tokens of a document are to be predicted."""

    @property
    def identity(self) -> str: ...

    @property
    def answers(self) -> bool: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, documents: Sequence[Document]) -> Sequence[Encoded]: ...


@dataclass(frozen=True)
class Plain:
    """Every document as its tokenizer begins and ends it."""

    tokenizer: Tokenizer

    @property
    def identity(self) -> str:
        t = self.tokenizer
        around = f" {t.before} {t.after}" if t.before or t.after else ""
        return f"{t.identity} {t.eos_id}{around}"

    @property
    def answers(self) -> bool:
        return False

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        ids = self.tokenizer.encode_documents([d.text for d in documents])
        sizes = (len(d.text.encode("utf-8", "surrogatepass")) for d in documents)
        return [Encoded(i, n) for i, n in zip(ids, sizes, strict=True)]


@dataclass(frozen=True, eq=False)
class Corpus:
    """`tokens`: uint16 or uint32, all documents in order, each begun and ended as its
    tokenizer does (`Tokenizer.encode_document`).
    Document i is ``tokens[offsets[i]:offsets[i + 1]]`` (int64 ``[n + 1]``), of ``n_bytes[i]`` UTF-8 bytes (int64
    ``[n]``). `identity` hashes documents, tokenizer and, of a part, how it was chosen. `answers`: uint8 as `tokens`, 1
    for tokens that are to be predicted; None = all."""

    tokens: np.ndarray
    offsets: np.ndarray
    n_bytes: np.ndarray
    names: tuple[str, ...]
    identity: str
    answers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])


def tokenize(documents: Sequence[Document], by: Tokenizer | Encoder, cache: Path) -> Corpus:
    """The corpus of `documents`; made once per content and tokenizer, and again, which is told, if the copy on disk is
    damaged.

    Documents are tokenized and written piece by piece. Raises `UserError` when the cache cannot be written.
    """
    encoder = Plain(by) if isinstance(by, Tokenizer) else by
    mark = _hash(f"{_VERSION} {encoder.identity} {identity(documents)}")
    folder = cache / "tokens" / mark
    found, why = _read(folder, mark, encoder)
    if found is None:
        if why:
            print(f"note: {folder}: damaged ({why}), made again", file=sys.stderr)
        _write(folder, mark, documents, encoder)
        found, _ = _read(folder, mark, encoder)
    if found is None:
        raise UserError(f"{folder}: what was just written cannot be read back; valid: a working disk for the cache")
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(folder: Path, mark: str, documents: Sequence[Document], encoder: Encoder) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as above:
            swap = Path(above) / mark
            swap.mkdir()
            _fill(swap, documents, encoder)
            if _read(folder, mark, encoder)[0] is None:  # else another process was faster
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(swap, folder)
    except OSError as e:
        if _read(folder, mark, encoder)[0] is None:
            raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None


def _fill(folder: Path, documents: Sequence[Document], encoder: Encoder) -> None:
    """All files of a corpus; no more than a piece of its tokens is in memory."""
    lengths, n_bytes, names = list[int](), list[int](), list[str]()
    tokens = _Growing(folder / "tokens.npy", _kinds(encoder)["tokens"])
    answers = _Growing(folder / "answers.npy", np.uint8) if encoder.answers else None
    told = time.monotonic()
    for piece in _pieces(documents):
        for document, made in zip(piece, encoder.encode(piece), strict=True):
            tokens.add(made.ids)
            if answers is not None:
                answers.add([True] * len(made.ids) if made.answers is None else made.answers)
            lengths.append(len(made.ids))
            n_bytes.append(made.n_bytes)
            names.append(document.name)
        if time.monotonic() - told > _PATIENCE:
            told = time.monotonic()
            print(f"tokenizing: {len(names):,} of {len(documents):,} documents", file=sys.stderr)
    tokens.close()
    if answers is not None:
        answers.close()
    np.save(folder / "offsets.npy", _offsets(lengths))
    np.save(folder / "n_bytes.npy", np.array(n_bytes, np.int64))
    sums = {n: _sum(folder / f"{n}.npy") for n in _kinds(encoder)}
    about = {"names": names, "sums": {**sums, "names": _sum_of(names)}}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _pieces(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in order, as many at a time as have `_PIECE` characters, at least one."""
    piece, size = list[Document](), 0
    for document in documents:
        piece.append(document)
        size += len(document.text)
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


class _Growing:
    """A one-dimensional ``.npy`` file that is written from front to back."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.file, self.dtype, self.n = path.open("w+b"), np.dtype(dtype), 0
        self._header()

    def _header(self) -> None:
        about = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.n,)}
        np.lib.format.write_array_header_1_0(self.file, about)  # NumPy leaves room for a longer shape

    def add(self, values: Sequence[int] | Sequence[bool]) -> None:
        self.file.write(np.asarray(values, self.dtype).tobytes())
        self.n += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


def _kinds(encoder: Encoder) -> dict[str, Any]:
    """The files of a corpus and the type of each one's numbers."""
    tokens = np.uint16 if encoder.vocab_size <= 2**16 else np.uint32
    kinds: dict[str, Any] = {"tokens": tokens, "offsets": np.int64, "n_bytes": np.int64}
    return {**kinds, "answers": np.uint8} if encoder.answers else kinds


def _read(folder: Path, mark: str, encoder: Encoder) -> tuple[Corpus | None, str]:
    """The copy on disk, or None and why it is not used: empty where there is none."""
    if not folder.exists():
        return None, ""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        arrays, sums = dict[str, np.ndarray](), {"names": _sum_of(about["names"])}
        for name, kind in _kinds(encoder).items():
            path = folder / f"{name}.npy"
            arrays[name], sums[name] = np.load(path, mmap_mode="r"), _sum(path)
            found = arrays[name]
            if found.ndim != 1 or found.dtype != kind or found.nbytes != sums[name][0]:  # the sum is over the numbers
                return None, f"{path.name} holds {found.dtype} {found.shape}"
        wrong = [name for name in sums if about["sums"].get(name) != sums[name]]
        if wrong or len(about["sums"]) != len(sums):
            return None, f"by the sum of its {wrong[0] if wrong else 'files'}"
        offsets, n_bytes = np.array(arrays["offsets"]), np.array(arrays["n_bytes"])
        return Corpus(arrays["tokens"], offsets, n_bytes, tuple(about["names"]), mark, arrays.get("answers")), ""
    except Exception as e:  # a damaged header of an array ends in errors of Python's own parser
        return None, type(e).__name__


def _sum(path: Path) -> list[int]:
    """Size in bytes, and a checksum (over 1 GB/s, so that a start stays quick) of the array in a file, which is read in
    pieces: pages of a memory map would stay in memory."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        size, check = 0, 0
        while data := file.read(2**22):
            size, check = size + len(data), zlib.crc32(data, check)
    return [size, check]


def _sum_of(names: Sequence[str]) -> list[int]:
    data = json.dumps(names).encode()
    return [len(data), zlib.crc32(data)]


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus | None]:
    """(trained on, held out): whole documents, about `fraction` of them held out, None for fraction 0.

    A hash of the seed and a document's name decides, so a document stays on its side when others are added; only where
    that leaves one side empty, the nearest document changes over. Raises `UserError` for a corpus of one document.
    """
    if fraction == 0:
        return corpus, None
    held = held_out(corpus.names, fraction, seed)
    return (
        take(corpus, np.flatnonzero(~held), f"train {fraction} {seed}"),
        take(corpus, np.flatnonzero(held), f"held out {fraction} {seed}"),
    )


def held_out(names: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """bool ``[n]``: which documents `split` holds out."""
    if fraction == 0:
        return np.zeros(len(names), bool)
    if not 0 < fraction < 1:
        raise UserError(f"train.data.held_out: must lie in [0, 1), found {fraction}")
    if len(names) < 2:
        raise UserError(
            f"train.data.held_out: {fraction} asked for, but the text is one document ({', '.join(names)}), and whole "
            "documents are held out; valid: several documents, or held_out = 0"
        )
    digests = [hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest() for name in names]
    place = np.array([int.from_bytes(d[:8], "big") / 2**64 for d in digests])
    held = place < fraction
    if not held.any():
        held[np.argmin(place)] = True
    if held.all():
        held[np.argmax(place)] = False
    return held


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def take(corpus: Corpus, which: np.ndarray, how: str) -> Corpus:
    """The documents `which` (their numbers, in order); `how` says how they were chosen, for the identity."""
    parts = [corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]] for i in which]
    names = tuple(corpus.names[i] for i in which)
    offsets = _offsets([len(p) for p in parts])
    answers = None
    if corpus.answers is not None:
        answers = np.concatenate([corpus.answers[corpus.offsets[i] : corpus.offsets[i + 1]] for i in which])
    mark = _hash(f"{corpus.identity} {how}")
    return Corpus(np.concatenate(parts), offsets, corpus.n_bytes[which], names, mark, answers)


def join(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus of all documents, in order; all of one tokenizer."""
    if len(corpora) == 1:
        return corpora[0]
    return Corpus(
        np.concatenate([c.tokens for c in corpora]),
        _offsets(np.concatenate([np.diff(c.offsets) for c in corpora])),
        np.concatenate([c.n_bytes for c in corpora]),
        tuple(name for c in corpora for name in c.names),
        _hash(" ".join(c.identity for c in corpora)),
        _join_answers(corpora),
    )


def _join_answers(corpora: Sequence[Corpus]) -> np.ndarray | None:
    if all(c.answers is None for c in corpora):
        return None
    return np.concatenate([np.ones(c.n_tokens, np.uint8) if c.answers is None else c.answers for c in corpora])
