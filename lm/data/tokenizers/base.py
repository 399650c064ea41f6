"""What a tokenizer is."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lm.errors import UserError


class Tokenizer(abc.ABC):
    """Text to ids and back.

    `bos_id`, `eos_id`: what its own files call the beginning and the end of a text, None where they name none.
    `before`, `after`: what its own rule puts around every text: the post-processor of a ``tokenizer.json``,
    ``add_bos_token`` and ``add_eos_token`` elsewhere.
    """

    bos_id: int | None
    eos_id: int | None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def base_size(self) -> int:
        """The same without the tokens that were added to the vocabulary later."""
        return self.vocab_size

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """A hash or name of all that determines the ids of a text, `before` and `after` aside."""

    @property
    def ends_documents(self) -> bool:
        """Whether documents in a row need an end between them; numbers do not."""
        return True

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone."""

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text that a model reads from its beginning, as its own rule says."""
        return [*self.before, *self.encode(text), *self.after]

    def encode_document(self, text: str) -> list[int]:
        """A text and, where the rule does not end it, the end of a document."""
        return self.encode_documents([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, in parallel where the library can."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each."""
        out = []
        for inner in self.encode_all(texts):
            ids = [*self.before, *inner, *self.after]
            out.append(ids if self.eos_id is None or ids[-1:] == [self.eos_id] else [*ids, self.eos_id])
        return out

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, and for each range of its characters the range of tokens that hold any of it.

        Here by the tokens that a text and its beginning share; tokenizers that know their tokens' places use those.
        """
        ids = self.encode(text)

        def before(at: int) -> tuple[int, bool]:
            head = self.encode(text[:at])
            n = same_start(head, ids)
            return n, n == len(head)

        ranges = []
        for a, b in spans:
            stop, whole = before(b)
            ranges.append((before(a)[0], stop if whole else stop + 1))
        return ids, ranges

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...

    def token(self, i: int) -> str:
        """How the vocabulary spells id `i`."""
        return self.decode([i])

    def find(self, token: str) -> int | None:
        """The id of a token by its spelling."""
        return None

    def is_special(self, i: int) -> bool:
        """Whether id `i` is a mark rather than text."""
        return i in (self.bos_id, self.eos_id)

    def continued(self, head: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to the text of `head`: a word that begins with a marker of words begins with a space, and a
        character may have begun in `head`."""
        near = list(head[-NEAR:])
        before, both = self.decode(near), self.decode([*near, *ids])
        return both[same_start(before.rstrip(TORN), both) :]

    def describe(self) -> dict[str, object]:
        """What a run's description says beside the files of `save`; JSON-ready."""
        return {"kind": "file", "bos_id": self.bos_id, "eos_id": self.eos_id}

    @abc.abstractmethod
    def save(self, folder: Path) -> dict[str, object]:
        """Writes the tokenizer's file into `folder`; gives what ``tokenizer_config.json`` has to say of it. One that
        has no file format writes nothing."""


NEAR = 16  # tokens that the beginning of the next text may depend on: markers of words, bytes of one character
TORN = "\ufffd"  # what bytes of a character that is not complete are decoded to


class Vocabulary(Protocol):
    """A model's configuration, as far as `check_vocab` reads it."""

    @property
    def vocab_size(self) -> int: ...


def same_start(a: Sequence[object], b: Sequence[object]) -> int:
    """How many first elements of two sequences are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_vocab(tokenizer: Tokenizer, config: Vocabulary) -> None:
    """Refuses a tokenizer of another model. Tokens that were added to a vocabulary later may have no row in the model:
    a text that uses one is refused (`check_ids`)."""
    if tokenizer.base_size > config.vocab_size:
        raise UserError(
            f"tokenizer: {tokenizer.base_size} ids, the model has model.vocab_size = {config.vocab_size}: "
            "foreign vocabulary; give the tokenizer the checkpoint was trained with"
        )


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int, what: str) -> list[int]:
    """`ids` as a list; `UserError` naming the first that a model of `vocab_size` rows has no embedding for."""
    beyond = next((i for i in ids if i >= vocab_size), None)
    if beyond is not None:
        raise UserError(
            f"{what}: the text has the token {tokenizer.token(beyond)!r}, id {beyond}, but the model has "
            f"{vocab_size} rows; valid: a text without it"
        )
    return list(ids)
