"""Byte-level BPE (arXiv 1508.07909, on bytes as GPT-2) trained on given documents."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lm.data.texts.document import Document, identity
from lm.data.tokenizers.huggingface import HFTokenizer
from lm.errors import UserError
from lm.files import sum_of_file, write_text

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
SMALLEST, LARGEST = 258, 2**20  # every byte, the end of a document and one merge; far beyond any vocabulary in use
_VERSION = 1  # raise when the training below changes what comes out


def trained(documents: Iterable[Document], vocab_size: int, cache: Path) -> HFTokenizer:
    """A tokenizer of `vocab_size` ids or fewer (small texts run out of pairs); eos is ``<|endoftext|>``, id 0.

    Deterministic; kept under `cache` by the documents' content, so that it is trained once. One that is damaged is told
    and trained again; one from before there were sums is read as it is. A text that spells
    ``<|endoftext|>`` out is text, not an end. Raises `UserError` for a size outside 258 … 2^20.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UserError(f"train.data.tokenizer: bpe:{vocab_size}: valid: bpe:N with N from {SMALLEST} to {LARGEST}")

    mark = hashlib.sha256(f"{_VERSION} {vocab_size} {identity(documents)}".encode()).hexdigest()[:32]
    path = cache / "tokenizers" / f"bpe-{vocab_size}-{mark}.json"
    inner = _kept(path) if path.is_file() else None
    if inner is None:
        inner = _train(documents, vocab_size)
        _keep(path, inner.to_str())
    inner.encode_special_tokens = True  # not part of the file
    return HFTokenizer(inner, bos_id=None, eos_id=0)


def _train(documents: Iterable[Document], vocab_size: int) -> tokenizers.Tokenizer:
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
    inner.train_from_iterator((d.text for d in documents), trainer)
    return inner


def _sum_beside(path: Path) -> Path:
    return path.with_suffix(".sum")


def _kept(path: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer in a file; None, which is told, where it is not what was written."""
    import tokenizers

    beside = _sum_beside(path)
    try:
        good = not beside.is_file() or beside.read_text(encoding="utf-8").strip() == sum_of_file(path)
        inner = tokenizers.Tokenizer.from_file(str(path)) if good else None
    except Exception:  # the library raises bare Exception
        inner = None
    if inner is None or inner.token_to_id(END) != 0:
        print(f"note: {path}: damaged, trained again", file=sys.stderr)
        return None
    return inner


def _keep(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sum_beside(path).unlink(missing_ok=True)  # of what is about to be replaced
        write_text(path, text)
        write_text(_sum_beside(path), sum_of_file(path) + "\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from None
