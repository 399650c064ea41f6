"""One text with its provenance, and the hash that says which texts a run read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """`name` is unique within its source, `source` says where the text came from, `licence` under which terms."""

    name: str
    text: str
    source: str
    licence: str


def identity(documents: Iterable[Document]) -> str:
    """A hash (64 hexadecimal digits) of names and texts in order; equal hashes mean a run reads the same thing."""
    digest = hashlib.sha256()
    for doc in documents:
        for part in (doc.name, doc.text):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big"))  # lengths first: moving a boundary changes the hash
            digest.update(data)
    return digest.hexdigest()
