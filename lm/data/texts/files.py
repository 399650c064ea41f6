"""Documents from the user's own files: one text file, a directory, a glob, or a field of JSON lines, JSON or Parquet.

Files may be compressed (``.gz``, ``.zst``). Lines of JSON end at newlines alone, as JSON lines do. Of a file with rows
a piece at a time is in memory; a text file is one document, which is.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm.data.texts.document import Document
from lm.data.texts.remote import find, is_address
from lm.data.texts.rows import FIELDS, decode, objects
from lm.data.texts.stored import Stored, local
from lm.errors import UserError, nearest
from lm.files import exists, user_path

# Files of these suffixes are read from a directory; a file or glob that is named outright may have any suffix.
SUFFIXES = (
    ".txt .text .md .markdown .rst .adoc .org .tex .py .pyi .c .h .cc .cpp .hpp .rs .go .java .js .ts .sh".split()
)
LICENCE = "the user's own file; not known"


def field_of(record: object, field: str, where: str) -> str:
    """The string at the dotted path `field` of nested dicts; a key that holds a dot itself is tried first."""
    value, rest = record, field
    while rest:
        if not isinstance(value, dict):
            raise UserError(f"{where}: field {field!r}: found {type(value).__name__} before {rest!r}; valid: an object")
        key, _, tail = (rest, "", "") if rest in value else rest.partition(".")
        if key not in value:
            present = ", ".join(sorted(str(k) for k in value)[:12]) or "none"
            raise UserError(f"{where}: field {field!r} is missing{nearest(key, value)}; fields present: {present}")
        value, rest = value[key], tail
    if isinstance(value, bytes):
        return decode(value, f"{where}: field {field!r}")
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r}: found {type(value).__name__}; valid: a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where}: field {field!r}: character {e.start} is half of a surrogate pair (U+{ord(value[e.start]):04X}); "
            "valid: Unicode text"
        ) from None
    return value


def records(spec: str, columns: Sequence[str]) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(name, place, object) of the rows of a file or glob; of Parquet `columns` alone, whose first must be there.

    Raises `UserError` for a missing or damaged file, and for one that has no rows.
    """
    path = user_path(spec, "texts")
    if is_address(spec):
        found = find(spec, FIELDS, None)[0]
    else:
        found = [local(path, path.name)] if path.is_file() else []
    if not found and glob.has_magic(spec):
        found = _globbed(path)
    if not found:
        raise UserError(f"texts: {spec!r} is no file with conversations; valid: FILE or GLOB of {', '.join(FIELDS)}")
    for file in found:
        if file.suffix not in FIELDS:
            raise UserError(f"{file.where}: holds no rows with fields; valid: {', '.join(FIELDS)}")
    for file in found:
        for number, where, record in objects(file, columns[0], columns[1:]):
            yield f"{file.base if len(found) == 1 else file.where}:{number}", where, record


def _file(file: Stored, field: str | None) -> Iterator[Document]:
    """The documents of one file; none when it is empty. Of rows one for every object that has a text in `field`."""
    if file.suffix in FIELDS:
        for number, where, record in objects(file, field or "text"):
            text = field_of(record, field or "text", where)
            if text:
                yield Document(f"{file.name}:{number}", text, file.where, LICENCE)
        return
    if field is not None:
        raise UserError(f"{file.where}: '#{field}' names a field, which only {', '.join(FIELDS)} files have")
    with file.opened() as opened:
        data = opened.read()
    text = decode(data, file.where)
    if text:
        yield Document(file.name, text, file.where, LICENCE)


def _listing(folder: Path) -> list[Stored]:
    """Text files below `folder`, sorted; hidden files and folders are left out."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    shown = sorted(p for p in found if not any(x.startswith(".") for x in p.relative_to(folder).parts) and p.is_file())
    return [local(p, p.relative_to(folder).as_posix()) for p in shown]


def _globbed(path: Path) -> list[Stored]:
    """The files that a glob matches, sorted, named from its first part that is no plain name on."""
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    root = _root(path)
    return [local(p, p.relative_to(root).as_posix()) for p in found]


def _root(path: Path) -> Path:
    first = next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
    return Path(*path.parts[:first])


def split_field(spec: str) -> tuple[str, str | None]:
    """``'a.jsonl#meta.text'`` -> ``('a.jsonl', 'meta.text')``; a '#' that belongs to an existing name stays."""
    path, mark, field = spec.rpartition("#")
    if not mark or exists(spec):
        return spec, None
    if not field:
        raise UserError(f"texts: {spec!r} has no field after '#'; valid: path.jsonl#field")
    return path, field


def read(spec: str) -> Iterator[Document]:
    """Documents of a file, directory or glob, here or at an address (`lm.data.texts.remote`), in sorted order; files
    without any text are skipped unless alone.

    Raises `UserError` for a missing, empty, binary or undecodable file, a malformed JSON line, a missing field, a
    folder without text files and a glob that matches no file.
    """
    name, field = split_field(spec)
    path = user_path(name, "texts")
    root: Path | str | None
    if is_address(name):
        found, root = find(name, SUFFIXES, field)
    elif path.is_file():
        found, root = [local(path, path.name)], None
    else:
        found, root = _several(path, name, field)
    some = False
    for file in found:
        for document in _file(file, field):
            some = True
            yield document
    if not some and root is None:
        raise UserError(f"{found[0].where}: empty file; valid: a file with text in it")
    if not some:
        raise UserError(f"texts: all {len(found)} files below {str(root)!r} are empty; valid: files with text in them")


def _several(path: Path, name: str, field: str | None) -> tuple[list[Stored], Path]:
    """The files of a folder or a glob, and the folder."""
    if path.is_dir():
        if field is not None:
            raise UserError(
                f"{path}: '#{field}' names a field; for JSON lines in a folder write {name}/*.jsonl#{field}"
            )
        files = _listing(path)
        if not files:
            raise UserError(f"{path}: the folder holds no text file; valid suffixes: {' '.join(SUFFIXES)}")
        return files, path
    if not glob.has_magic(name):
        close = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such file or folder{close}")
    files = _globbed(path)
    if not files:
        raise UserError(f"texts: the glob {name!r} matches no file")
    return files, _root(path)
