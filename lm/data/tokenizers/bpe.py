"""Tokenizers by name, and byte-level BPE (arXiv 1508.07909, on bytes as GPT-2) trained on given documents."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm.data.tokenizers.values as values
from lm.data.texts.document import Document, identity
from lm.data.tokenizers import (
    ByteTokenizer,
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    from_directory,
    from_json,
    from_sentencepiece,
)
from lm.errors import UserError, nearest

END = "<|endoftext|>"
SMALLEST, LARGEST = 258, 2**20  # every byte, the end of a document and one merge; far beyond any vocabulary in use
_VERSION = 1  # raise when the training below changes what comes out


def trained(documents: Sequence[Document], vocab_size: int, cache: Path) -> HFTokenizer:
    """A tokenizer of `vocab_size` ids or fewer (small texts run out of pairs); eos is ``<|endoftext|>``, id 0.

    Deterministic; kept under `cache` by the documents' content, so that it is trained once. A text that spells
    ``<|endoftext|>`` out is text, not an end. Raises `UserError` for a size outside 258 … 2^20.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UserError(f"train.data.tokenizer: bpe:{vocab_size}: valid: bpe:N with N from {SMALLEST} to {LARGEST}")
    import tokenizers

    mark = hashlib.sha256(f"{_VERSION} {vocab_size} {identity(documents)}".encode()).hexdigest()[:32]
    path = cache / "tokenizers" / f"bpe-{vocab_size}-{mark}.json"
    inner: Any = None
    if path.is_file():
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception:  # the library raises bare Exception; a damaged file is made again
            inner = None
    if inner is None or inner.token_to_id(END) != 0:
        inner = _train(documents, vocab_size)
        _keep(path, inner.to_str())
    inner.encode_special_tokens = True  # not part of the file
    return HFTokenizer(inner, bos_id=None, eos_id=0)


def _train(documents: Sequence[Document], vocab_size: int) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator((d.text for d in documents), trainer, length=len(documents))
    return inner


def _keep(path: Path, text: str) -> None:
    """Writes whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            swap = Path(folder) / path.name
            swap.write_text(text, encoding="utf-8")
            os.replace(swap, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from None


def by_name(spec: str, documents: Callable[[], Sequence[Document]], cache: Path) -> Tokenizer:
    """``bytes``; ``bpe:SIZE``, trained on ``documents()`` and kept under `cache`; ``values:BINS:CONTEXT`` for series of
    numbers, its range taken from ``documents()``; or the path of a ``tokenizer.json``,
    of a folder that holds one, or of a SentencePiece ``.model``. Raises `UserError` for anything else."""
    key = "train.data.tokenizer"
    valid = "valid: bytes, bpe:SIZE, values:BINS:CONTEXT, a tokenizer.json or its folder, a SentencePiece .model"
    kind, colon, size = spec.partition(":")
    if spec == "bytes":
        return ByteTokenizer()
    if kind == "bpe" and colon:
        if not size.isdecimal():
            raise UserError(f"{key}: bpe:{size}: the size is not a number; valid: bpe:4096, for example")
        return trained(documents(), int(size), cache)
    if kind == "values" and colon:
        return values.trained(spec, documents)
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        found = from_directory(path)
        if found is None:
            raise UserError(f"{key}: the folder {spec!r} holds no tokenizer.json and no tokenizer.model; {valid}")
        return _with_end(found)
    if path.is_file():
        return _with_end(from_sentencepiece(path) if path.suffix == ".model" else from_json(path))
    if path.parent.is_dir():
        close = nearest(path.name, [*(p.name for p in path.parent.iterdir()), "bytes", "bpe:4096"])
    else:
        close = nearest(spec, ("bytes", "bpe:4096"))
    raise UserError(f"{key}: no tokenizer {spec!r}{close}; {valid}")


def _with_end(tokenizer: Any) -> Tokenizer:
    """With the end-of-document id that the tokenizer itself names, where it names one."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        end = int(tokenizer.inner.eos_id())
        return dataclasses.replace(tokenizer, eos_id=end if end >= 0 else None)
    for name in ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"):
        end = tokenizer.inner.token_to_id(name)
        if end is not None:
            return dataclasses.replace(tokenizer, eos_id=end)
    return tokenizer
