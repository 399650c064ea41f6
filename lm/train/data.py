"""The data of a run: texts to rows of tokens, split, packed, in an order that seed and step determine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lm.data import corpus, texts, tokenizers
from lm.data.loader import Loader
from lm.data.packing import Packed
from lm.data.texts import Document
from lm.data.tokenizers import Tokenizer
from lm.errors import UserError
from lm.train.config import DataConfig, TrainConfig


@dataclass(frozen=True)
class Data:
    """`held_out` None: nothing is held out. `bytes_per_token` turns nats per token into bits per byte."""

    tokenizer: Tokenizer
    train: tuple[Packed, ...]
    held_out: Packed | None
    bytes_per_token: float
    identity: str

    def loader(self, train: TrainConfig, seed: int, share: tuple[int, int] = (0, 1)) -> Loader:
        """The batches, or of each the part `share` = (which, of how many)."""
        return Loader(
            self.train,
            train.data.weights or None,
            train.batch,
            seed,
            process_index=share[0],
            process_count=share[1],
        )


def prepare(train: TrainConfig, cache: Path, tokenizer: Tokenizer | None = None) -> Data:
    """Reads, tokenizes (both kept under `cache`), splits and packs the texts; `tokenizer` is the checkpoint's own.

    Raises `UserError` for missing or broken texts, for text that is too short, and for a tokenizer that is none.
    """
    d = train.data
    sources = [_documents(spec) for spec in d.texts]
    if not d.weights:  # then all texts are one source, so that texts of one document each can be split as well
        sources = [[doc for docs in sources for doc in docs]]
    if d.tokenizer or tokenizer is None:
        tokenizer = tokenizers.by_name(
            d.tokenizer or "bytes", lambda: [x for docs in sources for x in _trained_on(docs, d)], cache
        )
    whole = [corpus.tokenize(docs, tokenizer, cache) for docs in sources]
    halves = [corpus.split(c, d.held_out, d.split_seed) for c in whole]
    trained = tuple(Packed(half[0], d.seq_len, d.packing) for half in halves)
    rest = [half[1] for half in halves if half[1] is not None]
    held_out = Packed(corpus.join(rest), d.seq_len, d.packing) if rest else None
    n_bytes = sum(int(c.n_bytes.sum()) for c in whole)
    n_tokens = sum(int(c.offsets[-1]) for c in whole)
    about = [[c.identity for c in whole], d.seq_len, d.packing, d.held_out, d.split_seed, d.weights]
    identity = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    return Data(tokenizer, trained, held_out, n_bytes / n_tokens, identity)


def _trained_on(documents: list[Document], d: DataConfig) -> list[Document]:
    """Those that are not held out: a tokenizer must not have seen the others either."""
    held = corpus.held_out([doc.name for doc in documents], d.held_out, d.split_seed)
    return [doc for doc, out in zip(documents, held, strict=True) if not out]


def _documents(spec: str) -> list[Document]:
    try:
        return texts.documents(spec)
    except UserError as e:
        raise UserError(f"train.data.{e}" if str(e).startswith("texts") else f"train.data.texts: {e}") from None
