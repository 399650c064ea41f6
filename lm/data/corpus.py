"""Documents as one array of tokens, kept on disk by content and read through a memory map."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.document import Document, identity
from lm.errors import UserError

_VERSION = 1  # raise when the format or the way of tokenizing changes
_FILES = ("tokens", "offsets", "n_bytes")


@dataclass(frozen=True, eq=False)
class Corpus:
    """`tokens`: uint16 or uint32, all documents in order, each with the tokenizer's eos at its end if it has one.
    Document i is ``tokens[offsets[i]:offsets[i + 1]]`` (int64 ``[n + 1]``), of ``n_bytes[i]`` UTF-8 bytes."""

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


def tokenize(documents: Sequence[Document], tokenizer: Any, cache: Path) -> Corpus:
    """The corpus of `documents`; done once per content and tokenizer, a damaged copy is made again."""
    mark = hashlib.sha256(f"{_VERSION} {tokenizer.identity} {identity(documents)}".encode()).hexdigest()[:32]
    folder = cache / "tokens" / mark
    found = _read(folder, mark)
    if found is None:
        _write(folder, documents, tokenizer)
        found = _read(folder, mark)
    if found is None:
        raise UserError(f"{folder}: what was just written cannot be read back; valid: a working disk for the cache")
    return found


def _write(folder: Path, documents: Sequence[Document], tokenizer: Any) -> None:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    parts = [np.array([*tokenizer.encode(d.text), *end], dtype) for d in documents]
    arrays = {
        "tokens": np.concatenate(parts) if parts else np.zeros(0, dtype),
        "offsets": np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64),
        "n_bytes": np.array([len(d.text.encode("utf-8", "surrogatepass")) for d in documents], np.int64),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        swap = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, array in arrays.items():
            np.save(swap / f"{name}.npy", array)
        about = {"names": [d.name for d in documents], "sizes": {n: a.nbytes for n, a in arrays.items()}}
        (swap / "about.json").write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(swap, folder)
    except OSError as e:
        if not (folder / "about.json").is_file():  # else another process was faster
            raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None


def _read(folder: Path, mark: str) -> Corpus | None:
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        tokens, offsets, n_bytes = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in _FILES)
        if any(a.nbytes != about["sizes"][n] for n, a in zip(_FILES, (tokens, offsets, n_bytes), strict=True)):
            return None
        return Corpus(tokens, np.asarray(offsets), np.asarray(n_bytes), tuple(about["names"]), mark)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus | None]:
    """(trained on, held out): whole documents, `fraction` of them held out.

    A document's side follows from the seed and its name's rank among hashes: for a fixed set it is fixed. None held out
    for fraction 0. Raises `UserError` for a corpus of one document, which cannot be split.
    """
    if fraction == 0:
        return corpus, None
    if len(corpus) < 2:
        raise UserError(
            f"train.data.held_out: {fraction} asked for, but the text is one document ({corpus.names[0]!r}), and whole "
            "documents are held out; valid: several documents, or held_out = 0"
        )
    n = min(max(round(fraction * len(corpus)), 1), len(corpus) - 1)
    rank = sorted(range(len(corpus)), key=lambda i: hashlib.sha256(f"{seed} {i} {corpus.names[i]}".encode()).digest())
    held = set(rank[:n])
    return (
        _take(corpus, [i for i in range(len(corpus)) if i not in held], f"train {fraction} {seed}"),
        _take(corpus, sorted(held), f"held out {fraction} {seed}"),
    )


def _take(corpus: Corpus, which: list[int], how: str) -> Corpus:
    parts = [corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]] for i in which]
    return Corpus(
        np.concatenate(parts),
        np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64),
        corpus.n_bytes[which],
        tuple(corpus.names[i] for i in which),
        hashlib.sha256(f"{corpus.identity} {how}".encode()).hexdigest()[:32],
    )


def join(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus of all documents, in order; all of one tokenizer."""
    if len(corpora) == 1:
        return corpora[0]
    lengths = np.concatenate([np.diff(c.offsets) for c in corpora])
    return Corpus(
        np.concatenate([c.tokens for c in corpora]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([c.n_bytes for c in corpora]),
        tuple(name for c in corpora for name in c.names),
        hashlib.sha256(" ".join(c.identity for c in corpora).encode()).hexdigest()[:32],
    )
