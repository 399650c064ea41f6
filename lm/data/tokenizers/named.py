"""Tokenizers by name, by path and from a saved folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm.data.tokenizers.bpe as bpe
import lm.data.tokenizers.values as values
from lm.data.texts.document import Document
from lm.data.tokenizers.base import Tokenizer
from lm.data.tokenizers.bytes import ByteTokenizer
from lm.data.tokenizers.huggingface import from_json
from lm.data.tokenizers.sentencepiece import from_sentencepiece
from lm.errors import UserError, nearest


def by_name(spec: str, documents: Callable[[], Sequence[Document]], cache: Path) -> Tokenizer:
    """The tokenizer that the setting ``train.data.tokenizer`` names. Raises `UserError` for what is none of these:

    * ``bytes``;
    * ``bpe:SIZE``, trained on ``documents()`` and kept under `cache`;
    * ``values:BINS:CONTEXT`` for series of numbers, its range taken from ``documents()``;
    * the path of a ``tokenizer.json``, of a folder that holds one, or of a SentencePiece ``.model``.
    """
    key = "train.data.tokenizer"
    valid = "valid: bytes, bpe:SIZE, values:BINS:CONTEXT, a tokenizer.json or its folder, a SentencePiece .model"
    kind, colon, size = spec.partition(":")
    if spec == "bytes":
        return ByteTokenizer()
    if kind == "bpe" and colon:
        if not size.isdecimal():
            raise UserError(f"{key}: bpe:{size}: the size is not a number; valid: bpe:4096, for example")
        return bpe.trained(documents(), int(size), cache)
    if kind == "values" and colon:
        return values.trained(spec, documents)
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        found = from_directory(path)
        if found is None:
            raise UserError(f"{key}: the folder {spec!r} holds no tokenizer.json and no tokenizer.model; {valid}")
        return found.with_own_end()
    if path.is_file():
        return (from_sentencepiece(path) if path.suffix == ".model" else from_json(path)).with_own_end()
    if path.parent.is_dir():
        close = nearest(path.name, [*(p.name for p in path.parent.iterdir()), "bytes", "bpe:4096"])
    else:
        close = nearest(spec, ("bytes", "bpe:4096"))
    raise UserError(f"{key}: no tokenizer {spec!r}{close}; {valid}")


def from_directory(folder: Path, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer | None:
    """The tokenizer of ``tokenizer.json``, else of ``tokenizer.model``; None when there is neither file."""
    if (folder / "tokenizer.json").is_file():
        return from_json(folder / "tokenizer.json", bos_id, eos_id)
    if (folder / "tokenizer.model").is_file():
        return from_sentencepiece(folder / "tokenizer.model", bos_id, eos_id)
    return None


def from_description(folder: Path, about: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that ``tokenizer.save(folder)`` and ``tokenizer.describe()`` kept; None where there is no file."""
    kind, bos_id, eos_id = about.get("kind"), about.get("bos_id"), about.get("eos_id")
    if kind == "values":
        return values.from_description(about)
    return ByteTokenizer(bos_id, eos_id) if kind == "bytes" else from_directory(folder, bos_id, eos_id)
