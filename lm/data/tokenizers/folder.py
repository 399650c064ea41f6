"""The tokenizer's file in a folder."""

from __future__ import annotations

from pathlib import Path

from lm.data.tokenizers.base import Tokenizer
from lm.data.tokenizers.huggingface import from_json
from lm.data.tokenizers.sentencepiece import from_sentencepiece


def from_directory(folder: Path, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer | None:
    """The tokenizer of ``tokenizer.json``, else of ``tokenizer.model``; None when there is neither file."""
    if (folder / "tokenizer.json").is_file():
        return from_json(folder / "tokenizer.json", bos_id, eos_id)
    if (folder / "tokenizer.model").is_file():
        return from_sentencepiece(folder / "tokenizer.model", bos_id, eos_id)
    return None
