"""Documents from the user's own files: one text file, a directory, a glob, or a field of JSON lines, JSON or Parquet.

Files may be compressed (``.gz``, ``.zst``). Lines of JSON end at newlines alone, as JSON lines do.
"""

from __future__ import annotations

import glob
import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm.data.texts.document import Document
from lm.errors import UserError, nearest, told
from lm.files import exists, parse_json, read_bytes, user_path

# Files of these suffixes are read from a directory; a file or glob that is named outright may have any suffix.
SUFFIXES = (
    ".txt .text .md .markdown .rst .adoc .org .tex .py .pyi .c .h .cc .cpp .hpp .rs .go .java .js .ts .sh".split()
)
JSON_LINES = (".jsonl", ".ndjson")
JSON, PARQUET = ".json", ".parquet"
COMPRESSED = (".gz", ".zst")
FIELDS = (*JSON_LINES, JSON, PARQUET)  # what has fields
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


def _bytes(path: Path) -> bytes:
    """The contents of a file, decompressed."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; valid: a readable file of UTF-8 text") from None
    try:
        if path.suffix.lower() == ".gz":
            return gzip.decompress(data)
        if path.suffix.lower() == ".zst":
            return _from_zstd(data, path)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be decompressed ({e}); valid: a complete {path.suffix} file") from None
    return data


def _from_zstd(data: bytes, path: Path) -> bytes:
    if importlib.util.find_spec("zstandard") is None:
        raise UserError(f"{path}: reading it needs the library zstandard; get it with: pip install zstandard")
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
            return bytes(reader.read())
    except zstandard.ZstdError as e:
        raise OSError(str(e)) from None


def _suffix(path: Path) -> str:
    """What is in a file, whether compressed or not."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _read(path: Path) -> str:
    return decode(_bytes(path), str(path))


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


def _parsed(line: str, where: str, valid: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        said = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else told(e)
        raise UserError(f"{where}: malformed JSON ({said}); valid: {valid}") from None


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(line, object) of every line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        record = _parsed(line, where, "one object a line")
        if not isinstance(record, dict):
            raise UserError(f"{where}: found {type(record).__name__}; valid: one JSON object a line")
        yield number, record


def _json(text: str, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(number, object) of a list of objects, of one object, or of lines of objects, which some such files hold."""
    try:
        whole = parse_json(text, str(path))
    except UserError:
        yield from _json_lines(text, path)
        return
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
        if not isinstance(record, dict):
            raise UserError(f"{path} entry {number}: found {type(record).__name__}; valid: a list of objects")
        yield number, record


def _parquet(path: Path, field: str, more: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, object]]]:
    """(row, its fields), of the column that `field` begins with, and of those of `more` that there are."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: reading it needs the library pyarrow; get it with: pip install 'decoder-lab[data]'")
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(_bytes(path)))
        names = file.schema_arrow.names
        column = field if field in names else field.partition(".")[0]
        if column not in names:
            raise UserError(
                f"{path}: field {field!r} is missing{nearest(column, names)}; fields present: {', '.join(names[:12])}"
            )
        columns = [column, *(name for name in more if name in names)]
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except pyarrow.ArrowException as e:
        raise UserError(f"{path}: not a Parquet file ({str(e).splitlines()[0]})") from None


def _objects(path: Path, field: str, more: Sequence[str] = ()) -> Iterator[tuple[int, str, dict[str, object]]]:
    """(number, place, object) of every object in a file of such."""
    kind = _suffix(path)
    if kind == PARQUET:
        found, unit = _parquet(path, field, more), "row"
    elif kind == JSON:
        found, unit = _json(_read(path), path), "entry"
    else:
        found, unit = _json_lines(_read(path), path), "line"
    return ((number, f"{path} {unit} {number}", record) for number, record in found)


def _rows(path: Path, name: str, field: str) -> list[Document]:
    """A document for every object of a file that has a text in `field`."""
    texts = ((number, field_of(record, field, where)) for number, where, record in _objects(path, field))
    return [Document(f"{name}:{number}", text, str(path), LICENCE) for number, text in texts if text]


def records(spec: str, columns: Sequence[str]) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(name, place, object) of the rows of a file or glob; of Parquet `columns` alone, whose first must be there.

    Raises `UserError` for a missing or damaged file, and for one that has no rows.
    """
    path = user_path(spec, "texts")
    found = [path] if path.is_file() else []
    if not found and glob.has_magic(spec):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise UserError(f"texts: {spec!r} is no file with conversations; valid: FILE or GLOB of {', '.join(FIELDS)}")
    for file in found:
        if _suffix(file) not in FIELDS:
            raise UserError(f"{file}: holds no rows with fields; valid: {', '.join(FIELDS)}")
        for number, where, record in _objects(file, columns[0], columns[1:]):
            yield f"{file.name if len(found) == 1 else file.as_posix()}:{number}", where, record


def _file(path: Path, name: str, field: str | None) -> list[Document]:
    """The documents of one file; an empty list when it is empty."""
    if _suffix(path) in FIELDS:
        return _rows(path, name, field or "text")
    if field is not None:
        raise UserError(f"{path}: '#{field}' names a field, which only {', '.join(FIELDS)} files have")
    text = _read(path)
    return [Document(name, text, str(path), LICENCE)] if text else []


def _listing(folder: Path) -> list[Path]:
    """Text files below `folder`, sorted; hidden files and folders are left out."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return sorted(p for p in found if not any(x.startswith(".") for x in p.relative_to(folder).parts) and p.is_file())


def split_field(spec: str) -> tuple[str, str | None]:
    """``'a.jsonl#meta.text'`` -> ``('a.jsonl', 'meta.text')``; a '#' that belongs to an existing name stays."""
    path, mark, field = spec.rpartition("#")
    if not mark or exists(spec):
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
    path = user_path(name, "texts")
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
