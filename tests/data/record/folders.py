"""Folders as people bring them: a tokenizer's file of our making and the JSON files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from lm.data.tokenizers import ByteTokenizer

BOS, EOS = 256, 257


def byte_level(*added: str) -> Tokenizer:
    """Bytes as ids 0 to 255, ``<s>`` 256, ``</s>`` 257, and `added` as special tokens behind them."""
    inner = ByteTokenizer()._as_bpe()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return inner


def around(single: str, **tokens: int) -> processors.TemplateProcessing:
    """A post-processor: ``$A`` with special tokens."""
    return processors.TemplateProcessing(single=single, special_tokens=list(tokens.items()))


def write(folder: Path, inner: Tokenizer | None = None, **files: Any) -> Path:
    """A folder of `inner` and, by the names of `files` without their ending, JSON objects beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if inner is not None:
        inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
