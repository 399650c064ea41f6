"""One text with its provenance, many that are read anew each time, and the hash that says which texts a run read."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lm.errors import UserError

_KEPT = 2**24  # characters, with some for every document, that are kept rather than read again
_EACH = 256  # what a document takes beside its text
_PATIENCE = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Document:
    """`name` is unique within its source, `source` says where the text came from, `licence` under which terms."""

    name: str
    text: str
    source: str
    licence: str


class Identity:
    """The hash of names and texts in order, made while they pass by."""

    def __init__(self) -> None:
        self._digest, self.count = hashlib.sha256(), 0

    def add(self, doc: Document) -> None:
        self.count += 1
        for part in (doc.name, doc.text):
            data = part.encode("utf-8", "surrogatepass")
            self._digest.update(len(data).to_bytes(8, "big"))  # lengths first: moving a boundary changes the hash
            self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class Documents(Iterable[Document]):
    """Documents that can be gone through again and again, in memory that does not grow with them.

    ``read()`` gives them from the first one on. What its first pass finds is kept where it is small, else read again.
    """

    def __init__(self, read: Callable[[], Iterable[Document]]) -> None:
        self._read = read
        self._kept: tuple[Document, ...] | None = None
        self._known: tuple[str, int] | None = None

    def __iter__(self) -> Iterator[Document]:
        """Raises `UserError` where a later pass finds other documents than the first."""
        if self._kept is not None:
            yield from self._kept
            return
        passed, size, made = list[Document](), 0, Identity()
        for doc in self._read():
            made.add(doc)
            if self._known is not None and made.count > self._known[1]:
                break
            if size <= _KEPT:
                size += len(doc.text) + _EACH
                passed.append(doc)
                if size > _KEPT:
                    passed.clear()
            yield doc
        found = (made.hexdigest(), made.count)
        if self._known not in (None, found):
            raise UserError("texts: a file was changed while it was read; valid: files at rest")
        self._known = found
        if size <= _KEPT:
            self._kept = tuple(passed)

    @property
    def known(self) -> tuple[str, int]:
        """The hash of all of them (`identity`) and how many they are; goes through them where nobody has."""
        if self._known is None:
            told = time.monotonic()
            for count, _ in enumerate(self, 1):
                if time.monotonic() - told > _PATIENCE:
                    told = time.monotonic()
                    print(f"reading: {count:,} documents", file=sys.stderr)
        assert self._known is not None
        return self._known


def identity(documents: Iterable[Document]) -> str:
    """A hash (64 hexadecimal digits) of names and texts in order; equal hashes mean a run reads the same thing."""
    return (documents if isinstance(documents, Documents) else Documents(lambda: documents)).known[0]
