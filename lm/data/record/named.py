"""Records by name, by path and from a saved folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lm.data.tokenizers.bpe as bpe
import lm.data.tokenizers.values as values
from lm.data.record.folder import from_folder, read_object
from lm.data.record.record import TextRecord
from lm.data.texts.document import Document
from lm.data.tokenizers import ByteTokenizer, Tokenizer, from_json, from_sentencepiece
from lm.data.tokenizers.huggingface import ENDS
from lm.errors import UserError, nearest, shown
from lm.files import user_path

KEY = "train.data.tokenizer"


def by_name(spec: str, documents: Callable[[], Iterable[Document]], cache: Path) -> TextRecord:
    """The record of the tokenizer that the setting ``train.data.tokenizer`` names; without an end of a document where
    its files name none. Raises `UserError` for what is none of these:

    * ``bytes``;
    * ``bpe:SIZE``, trained on ``documents()`` and kept under `cache`;
    * ``values:BINS:CONTEXT`` for series of numbers, its range taken from ``documents()``;
    * the path of a ``tokenizer.json``, of a folder that holds one, or of a SentencePiece ``.model``.
    """
    valid = "valid: bytes, bpe:SIZE, values:BINS:CONTEXT, a tokenizer.json or its folder, a SentencePiece .model"
    kind, colon, size = spec.partition(":")
    if spec == "bytes":
        return TextRecord.of(ByteTokenizer())
    if kind == "bpe" and colon:
        if not re.fullmatch("[0-9]{1,99}", size):
            raise UserError(f"{KEY}: bpe:{size}: the size is not a number; valid: bpe:4096, for example")
        return TextRecord.of(bpe.trained(documents(), int(size), cache))
    if kind == "values" and colon:
        return TextRecord.of(values.trained(spec, documents))
    path = user_path(spec, KEY)
    if spec and path.is_dir():
        found = from_folder(path, read_object(path / "config.json"))
        if found.tokenizer is None:
            raise UserError(f"{KEY}: the folder {spec!r} holds no tokenizer.json and no tokenizer.model; {valid}")
        return found if found.eos_ids else dataclasses.replace(found, tokenizer=_ended(found.tokenizer))
    if path.is_file():
        return _file(path)
    if path.parent.is_dir():
        close = nearest(path.name, [*(p.name for p in path.parent.iterdir()), "bytes", "bpe:4096"])
    else:
        close = nearest(spec, ("bytes", "bpe:4096"))
    raise UserError(f"{KEY}: no tokenizer {shown(spec)}{close}; {valid}")


def _file(path: Path) -> TextRecord:
    """A tokenizer's file alone."""
    if path.suffix != ".model":
        return TextRecord.of(_ended(from_json(path)))
    piece = from_sentencepiece(path)
    end = int(piece.inner.eos_id())
    return TextRecord.of(dataclasses.replace(piece, eos_id=end if end >= 0 else None))


def _ended(tokenizer: Tokenizer) -> Tokenizer:
    """The same with an end of a document, where nobody says which it is: what the post-processor puts behind a text, or
    a token of a usual name."""
    known = (tokenizer.find(token) for token in ENDS)
    end = tokenizer.after[-1] if tokenizer.after else next((i for i in known if i is not None), None)
    assert dataclasses.is_dataclass(tokenizer)
    return dataclasses.replace(tokenizer, eos_id=end)


def from_description(folder: Path, about: Mapping[str, Any]) -> TextRecord:
    """What ``record.save(folder)`` and ``tokenizer.describe()`` kept."""
    kind, bos_id, eos_id = about.get("kind"), about.get("bos_id"), about.get("eos_id")
    if kind == "values":
        return TextRecord.of(values.from_description(about))
    config = {"bos_token_id": bos_id, "eos_token_id": about.get("eos_ids", eos_id)}
    return from_folder(folder, config, ByteTokenizer(bos_id, eos_id) if kind == "bytes" else None)
