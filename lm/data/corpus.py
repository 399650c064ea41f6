"""Documents as one array of tokens, kept on disk by content and read through a memory map."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.data.texts.document import Document, identity
from lm.data.tokenizers import Tokenizer
from lm.errors import UserError

_VERSION = 2  # raise when the format or the way of tokenizing changes
_FILES = ("tokens", "offsets", "n_bytes")


@dataclass(frozen=True, eq=False)
class Corpus:
    """`tokens`: uint16 or uint32, all documents in order, each begun and ended as its
    tokenizer does (`Tokenizer.encode_document`).
    Document i is ``tokens[offsets[i]:offsets[i + 1]]`` (int64 ``[n + 1]``), of ``n_bytes[i]`` UTF-8 bytes (int64
    ``[n]``). `identity` hashes documents, tokenizer and, of a part, how it was chosen."""

    tokens: np.ndarray
    offsets: np.ndarray
    n_bytes: np.ndarray
    names: tuple[str, ...]
    identity: str

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, cache: Path) -> Corpus:
    """The corpus of `documents`; made once per content and tokenizer, and again if the copy on disk is damaged.

    Raises `UserError` when the cache cannot be written.
    """
    around = f" {tokenizer.before} {tokenizer.after}" if tokenizer.before or tokenizer.after else ""
    about = f"{_VERSION} {tokenizer.identity} {tokenizer.eos_id}{around} {identity(documents)}"
    mark = _hash(about)
    folder = cache / "tokens" / mark
    found = _read(folder, mark)
    if found is None:
        _write(folder, mark, documents, tokenizer)
        found = _read(folder, mark)
    if found is None:
        raise UserError(f"{folder}: what was just written cannot be read back; valid: a working disk for the cache")
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(folder: Path, mark: str, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    parts = [np.array(tokenizer.encode_document(d.text), dtype) for d in documents]
    arrays = {
        "tokens": np.concatenate(parts) if parts else np.zeros(0, dtype),
        "offsets": _offsets([len(p) for p in parts]),
        "n_bytes": np.array([len(d.text.encode("utf-8", "surrogatepass")) for d in documents], np.int64),
    }
    about = {"names": [d.name for d in documents], "sums": {n: _sum(a) for n, a in arrays.items()}}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as above:
            swap = Path(above) / mark
            swap.mkdir()
            for name, array in arrays.items():
                np.save(swap / f"{name}.npy", array)
            (swap / "about.json").write_text(json.dumps(about), encoding="utf-8")
            if _read(folder, mark) is None:  # else another process was faster
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(swap, folder)
    except OSError as e:
        if _read(folder, mark) is None:
            raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None


def _read(folder: Path, mark: str) -> Corpus | None:
    """None when the copy is missing, cut short or changed."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in _FILES}
        if about["sums"] != {n: _sum(a) for n, a in arrays.items()}:
            return None
        offsets, n_bytes = np.array(arrays["offsets"]), np.array(arrays["n_bytes"])
        return Corpus(arrays["tokens"], offsets, n_bytes, tuple(about["names"]), mark)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _sum(array: np.ndarray) -> list[int]:
    """Size in bytes, and a checksum (over 1 GB/s, so that a start stays quick)."""
    return [array.nbytes, zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)]


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus | None]:
    """(trained on, held out): whole documents, about `fraction` of them held out, None for fraction 0.

    A hash of the seed and a document's name decides, so a document stays on its side when others are added; only where
    that leaves one side empty, the nearest document changes over. Raises `UserError` for a corpus of one document.
    """
    if fraction == 0:
        return corpus, None
    held = held_out(corpus.names, fraction, seed)
    return (
        _take(corpus, np.flatnonzero(~held), f"train {fraction} {seed}"),
        _take(corpus, np.flatnonzero(held), f"held out {fraction} {seed}"),
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


def _take(corpus: Corpus, which: np.ndarray, how: str) -> Corpus:
    parts = [corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]] for i in which]
    names = tuple(corpus.names[i] for i in which)
    offsets = _offsets([len(p) for p in parts])
    return Corpus(np.concatenate(parts), offsets, corpus.n_bytes[which], names, _hash(f"{corpus.identity} {how}"))


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
    )
