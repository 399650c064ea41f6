"""The data of a run: texts to rows of tokens, split, packed, in an order that seed and step determine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lm.data import conversations, corpus, record, texts
from lm.data.loader import Loader
from lm.data.packing import Packed
from lm.data.record import TextRecord
from lm.data.texts import Document
from lm.data.tokenizers import Tokenizer, check_ids
from lm.errors import UserError
from lm.train.config import DataConfig, TrainConfig


@dataclass(frozen=True)
class Data:
    """`held_out` None: nothing is held out. `bytes_per_token` turns nats per token into bits per byte."""

    text: TextRecord
    train: tuple[Packed, ...]
    held_out: Packed | None
    bytes_per_token: float
    identity: str

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.needs_tokenizer("train.data.tokenizer")

    def check(self, vocab_size: int) -> None:
        """Raises `UserError` where a text has a token that a model of `vocab_size` rows has no embedding for."""
        if self.tokenizer.vocab_size > vocab_size:
            for part in (*self.train, *([] if self.held_out is None else [self.held_out])):
                check_ids(self.tokenizer, part.corpus.tokens.tolist(), vocab_size, "train.data.texts")

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


def prepare(train: TrainConfig, cache: Path, text: TextRecord | None = None) -> Data:
    """Reads, tokenizes (both kept under `cache`), splits and packs the texts; `text` is what the checkpoint says.

    Raises `UserError` for missing or broken texts, for text that is too short, for a tokenizer that is none, and for
    one that has no end of a document.
    """
    d = train.data
    chat = d.kind == "chat"
    sources = [_documents(spec, chat) for spec in d.texts]
    if not d.weights:  # then all texts are one source, so that texts of one document each can be split as well
        sources = [[doc for docs in sources for doc in docs]]
    if d.tokenizer or text is None or text.tokenizer is None:
        text = record.by_name(
            d.tokenizer or "bytes", lambda: [x for docs in sources for x in _trained_on(docs, d)], cache
        )
    tokenizer = text.needs_tokenizer("train.data.tokenizer")
    if tokenizer.eos_id is None and tokenizer.ends_documents and not chat:
        raise UserError(
            f"train.data.tokenizer: {d.tokenizer or text.source} names no end of a document, and documents would run "
            "into each other; valid: a folder whose config.json or tokenizer_config.json names eos"
        )
    if chat:
        text = conversations.with_template(text, d.template)
        whole = [conversations.tokenize(docs, text, d.template, d.seq_len, cache) for docs in sources]
    else:
        whole = [corpus.tokenize(docs, tokenizer, cache) for docs in sources]
    halves = [corpus.split(c, d.held_out, d.split_seed) for c in whole]
    trained = tuple(Packed(half[0], d.seq_len, d.packing) for half in halves)
    rest = [half[1] for half in halves if half[1] is not None]
    held_out = Packed(corpus.join(rest), d.seq_len, d.packing) if rest else None
    n_bytes = sum(int(c.n_bytes.sum()) for c in whole)
    n_tokens = sum(int(c.offsets[-1]) for c in whole)
    about = [[c.identity for c in whole], d.seq_len, d.packing, d.held_out, d.split_seed, d.weights]
    identity = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    return Data(text, trained, held_out, n_bytes / n_tokens, identity)


def _trained_on(documents: list[Document], d: DataConfig) -> list[Document]:
    """Those that are not held out: a tokenizer must not have seen the others either."""
    held = corpus.held_out([doc.name for doc in documents], d.held_out, d.split_seed)
    return [doc for doc, out in zip(documents, held, strict=True) if not out]


def _documents(spec: str, chat: bool) -> list[Document]:
    try:
        return conversations.documents(spec) if chat else texts.documents(spec)
    except UserError as e:
        raise UserError(f"train.data.{e}" if str(e).startswith("texts") else f"train.data.texts: {e}") from None
