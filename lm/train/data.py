"""The data of a run: texts to rows of tokens, split, packed, in an order that seed and step determine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.data import conversations, corpus, record, texts
from lm.data.loader import Loader
from lm.data.packing import Packed
from lm.data.ragged import Names
from lm.data.record import TextRecord
from lm.data.texts import Document, Documents
from lm.data.tokenizers import Tokenizer, check_ids
from lm.errors import UserError
from lm.train.config import DataConfig, TrainConfig

_PIECE = 2**20  # tokens that are checked at a time


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
                for first in range(0, part.corpus.n_tokens, _PIECE):
                    ids = part.corpus.tokens[first : first + _PIECE].tolist()
                    check_ids(self.tokenizer, ids, vocab_size, "train.data.texts")

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
    # Without weights all texts are one source, so that texts of one document each can be split as well.
    sources = [_documents(specs, chat) for specs in ([(spec,) for spec in d.texts] if d.weights else [d.texts])]
    for docs in sources:
        docs.known  # noqa: B018  (faults of the texts come before any work)
    if d.tokenizer or text is None or text.tokenizer is None:
        text = record.by_name(d.tokenizer or "bytes", lambda: _trained_on(sources, d), cache)
    tokenizer = text.needs_tokenizer("train.data.tokenizer")
    if tokenizer.eos_id is None and tokenizer.ends_documents and not chat:
        raise UserError(
            f"train.data.tokenizer: {d.tokenizer or text.source} names no end of a document, and documents would run "
            "into each other; valid: a folder whose config.json or tokenizer_config.json names eos"
        )
    if chat:
        text = conversations.with_template(text, d.template)
        whole = [
            conversations.tokenize(docs, text, d.template, d.seq_len, cache, d.learn, d.overlong) for docs in sources
        ]
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


def _trained_on(sources: Sequence[Documents], d: DataConfig) -> Documents:
    """Those that are not held out: a tokenizer must not have seen the others either."""
    held = [corpus.held_out(Names.of(doc.name for doc in docs), d.held_out, d.split_seed) for docs in sources]
    return Documents(
        lambda: (
            doc
            for docs, outs in zip(sources, held, strict=True)
            for doc, out in zip(docs, outs, strict=True)
            if not out
        )
    )


def _documents(specs: Sequence[str], chat: bool) -> Documents:
    """Those of all of the specs, in order."""
    one = conversations.stream if chat else texts.stream

    def read() -> Iterator[Document]:
        try:
            for spec in specs:
                yield from one(spec)
        except UserError as e:
            raise UserError(f"train.data.{e}" if str(e).startswith("texts") else f"train.data.texts: {e}") from None

    return Documents(read)
