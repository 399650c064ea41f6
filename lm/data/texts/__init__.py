"""Texts by name: ``stream(spec)`` and ``documents(spec)`` for installed sources and for the user's own files.

A spec is one of the following, or several separated by commas (a comma inside a name is written ``\\,``):

* a named source: ``kjv``, ``wikipedia``, ``python-source``, ``python-docs``, or one member of it: ``kjv:Genesis``;
* a file of UTF-8 text, a folder (its text files, recursively), a glob;
* JSON lines: ``path.jsonl`` (field ``text``) or ``path.jsonl#meta.body``; one document a line; likewise ``.json`` (a
  list of objects) and ``.parquet``; any file may be ``.gz`` or ``.zst``;
* the same at an address: ``s3://bucket/*.jsonl.gz#text``, ``gs://…``, ``https://…``, ``hf://datasets/…``, whatever
  fsspec reaches (`lm.data.texts.remote`);
* ``tfds:name[/config][:version][:split][#field]``: a prepared array_record dataset; one document an example;
* ``hf:[owner/]name[:split][#field]``, ``hf:owner/name/config…`` or ``hf:./folder…``: a Hugging Face dataset, likewise;
  ``?streaming`` at its end reads it as it comes, ``?take=N`` the first N examples;
* ``series:PACKAGE/TABLE#COLUMN?…``: a time series as numbers in text (`lm.data.texts.series`).

A name in the table wins over a file of the same name; write ``./kjv`` for the file. ``python -m lm.data.texts`` prints
the table, ``python -m lm.data.texts SPEC`` the documents of a spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from lm.data.texts import files, hf_datasets, remote
from lm.data.texts.document import Document, Documents, identity
from lm.data.texts.rows import FIELDS
from lm.data.texts.sources import SOURCES, Source
from lm.errors import UserError, nearest, shown
from lm.files import exists

__all__ = ["SOURCES", "Document", "Documents", "Source", "documents", "identity", "records", "stream"]


def documents(spec: str, *, min_chars: int = 0) -> list[Document]:
    """All that `stream` gives."""
    return list(stream(spec, min_chars=min_chars))


def stream(spec: str, *, min_chars: int = 0) -> Iterator[Document]:
    """The documents of `spec`, in order, those shorter than `min_chars` characters left out, each read when it is asked
    for.

    Raises `UserError` when the spec names nothing that exists, when a text is empty, binary or not UTF-8, when a JSON
    line is malformed or lacks the field, and when no document is left.
    """
    if not isinstance(spec, str) or not spec.strip():
        valid = f"a named source ({', '.join(SOURCES)}), a file, folder or glob"
        raise UserError(f"texts: found {shown(spec)}; valid: {valid}")
    if "\0" in spec:
        raise UserError(f"texts: {spec!r} holds a NUL character")
    some, count, longest = False, 0, 0
    for document in (d for part in _parts(spec) for d in _one(part)):
        count, longest = count + 1, max(longest, len(document.text))
        if len(document.text) >= min_chars:
            some = True
            yield document
    if not some:
        raise UserError(
            f"texts: no document of {spec!r} has {min_chars} characters; the longest of {count} has {longest}"
        )


def records(spec: str, columns: Sequence[str]) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(name, place, object) of the rows of `spec`, a file or glob of JSON lines, JSON or Parquet, or ``hf:NAME``.

    Of each at least ``columns[0]`` where the format has columns. Raises `UserError` as `documents`.
    """
    for part in _parts(spec):
        name, _, member = part.partition(":")
        if remote.is_address(part):
            yield from files.records(part, columns)
        elif name == "hf":
            yield from hf_datasets.records(member, columns)
        elif name in SOURCES:
            raise UserError(f"texts: {part!r} is text, not conversations; valid: {', '.join(FIELDS)}, hf:NAME")
        else:
            yield from files.records(part, columns)


def _parts(spec: str) -> list[str]:
    if exists(spec):
        return [spec]
    parts = [p.strip().replace("\\,", ",") for p in re.split(r"(?<!\\),", spec)]
    if "" in parts:
        raise UserError(f"texts: {spec!r} has an empty part between commas")
    return parts


def _one(spec: str) -> Iterable[Document]:
    name, colon, member = spec.partition(":")
    if remote.is_address(spec):
        return files.read(spec)
    if name in SOURCES:
        if colon and not member:
            raise UserError(f"texts: {spec!r} names no member; valid: {name} or {SOURCES[name].members}")
        return SOURCES[name].loader(member or None)
    path = files.split_field(spec)[0]
    if re.search(r"[/\\.*?\[~]", path.partition(":")[0]) or exists(path):
        return files.read(spec)
    raise UserError(
        f"texts: unknown source or file {spec!r}{nearest(name, SOURCES)}; valid: {', '.join(SOURCES)}, or the path of "
        "a file, folder or glob"
    )
