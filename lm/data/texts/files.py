"""Documents from the user's own files: one text file, a directory, a glob, or a field of JSON lines."""

from __future__ import annotations

import glob
import json
from pathlib import Path

from lm.data.texts.document import Document
from lm.errors import UserError, nearest

# Files of these suffixes are read from a directory; a file or glob that is named outright may have any suffix.
SUFFIXES = (
    ".txt .text .md .markdown .rst .adoc .org .tex .py .pyi .c .h .cc .cpp .hpp .rs .go .java .js .ts .sh".split()
)
JSON_LINES = (".jsonl", ".ndjson")
LICENCE = "the user's own file; not known"


def decode(data: bytes, where: str) -> str:
    """UTF-8 text (a byte order mark is dropped); `UserError` that names `where` for binary or undecodable bytes."""
    zero = data.find(b"\0")
    if zero >= 0:
        raise UserError(f"{where}: binary file (NUL byte at byte offset {zero}); valid: UTF-8 text")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where}: byte offset {e.start} (0x{data[e.start]:02x}) is not UTF-8; valid: UTF-8 text, "
            "for example after iconv -t UTF-8"
        ) from None


def _read(path: Path) -> str:
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); valid: a readable file of UTF-8 text") from None


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
    return value


def _json_lines(path: Path, name: str, field: str) -> list[Document]:
    out = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(
                f"{where}: malformed JSON ({e.msg} at column {e.colno}); valid: one object a line"
            ) from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: found {type(record).__name__}; valid: one JSON object a line")
        text = field_of(record, field, where)
        if text:
            out.append(Document(f"{name}:{number}", text, str(path), LICENCE))
    return out


def _file(path: Path, name: str, field: str | None) -> list[Document]:
    """The documents of one file; an empty list when it is empty."""
    if path.suffix.lower() in JSON_LINES:
        return _json_lines(path, name, field or "text")
    if field is not None:
        raise UserError(f"{path}: '#{field}' names a field, which only {' and '.join(JSON_LINES)} files have")
    text = _read(path)
    return [Document(name, text, str(path), LICENCE)] if text else []


def _listing(folder: Path) -> list[Path]:
    """Text files below `folder`, sorted; hidden files and folders are left out."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return sorted(p for p in found if not any(x.startswith(".") for x in p.relative_to(folder).parts) and p.is_file())


def split_field(spec: str) -> tuple[str, str | None]:
    """``'a.jsonl#meta.text'`` -> ``('a.jsonl', 'meta.text')``; a '#' that belongs to an existing name stays."""
    path, mark, field = spec.rpartition("#")
    if not mark or Path(spec).expanduser().exists():
        return spec, None
    if not field:
        raise UserError(f"texts: {spec!r} has no field after '#'; valid: path.jsonl#field")
    return path, field


def read(spec: str) -> list[Document]:
    """Documents of a file, directory or glob, in sorted order; files without any text are skipped unless alone.

    Raises `UserError` for a missing, empty, binary or undecodable file, a malformed JSON line, a missing field, a
    folder without text files and a glob that matches no file.
    """
    name, field = split_field(spec)
    path = Path(name).expanduser()
    if path.is_file():
        found = _file(path, path.name, field)
        if not found:
            raise UserError(f"{path}: empty file; valid: a file with text in it")
        return found
    if path.is_dir():
        if field is not None:
            raise UserError(
                f"{path}: '#{field}' names a field; for JSON lines in a folder write {name}/*.jsonl#{field}"
            )
        files = _listing(path)
        if not files:
            raise UserError(f"{path}: the folder holds no text file; valid suffixes: {' '.join(SUFFIXES)}")
        return _all(files, path, None)
    if not glob.has_magic(name):
        close = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such file or folder{close}")
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not files:
        raise UserError(f"texts: the glob {name!r} matches no file")
    fixed = [part for part in path.parts if glob.has_magic(part)]
    root = Path(*path.parts[: path.parts.index(fixed[0])])
    return _all(files, root, field)


def _all(files: list[Path], root: Path, field: str | None) -> list[Document]:
    found = [d for p in files for d in _file(p, p.relative_to(root).as_posix(), field)]
    if not found:
        raise UserError(f"texts: all {len(files)} files below {str(root)!r} are empty; valid: files with text in them")
    return found
