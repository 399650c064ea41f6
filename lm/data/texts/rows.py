"""Objects in files, one at a time: lines of JSON, a list in JSON, Parquet."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, TextIO

from lm.data.texts.stored import Stored
from lm.errors import UserError, nearest

JSON_LINES = (".jsonl", ".ndjson")
JSON, PARQUET = ".json", ".parquet"
FIELDS = (*JSON_LINES, JSON, PARQUET)  # what has fields
_CHUNK = 2**20  # characters of a list that are read at a time
_BATCH = 256  # rows of Parquet, likewise
_SPACE = re.compile(r"[ \t\r\n]*")

Row = dict[str, object]


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


def objects(stored: Stored, field: str, more: Sequence[str] = ()) -> Iterator[tuple[int, str, Row]]:
    """(number, place, object) of every object in a file of such; no more than a piece of the file is in memory.

    Of Parquet the column that `field` begins with, which must be there, and those of `more` that are.
    """
    if stored.suffix == PARQUET:
        found, unit = _parquet(stored, field, more), "row"
    elif stored.suffix == JSON:
        found, unit = _json(stored), "entry"
    else:
        found, unit = _lines(stored), "line"
    for number, record in found:
        yield number, f"{stored.where} {unit} {number}", record


def _lines(stored: Stored) -> Iterator[tuple[int, Row]]:
    """(line, object) of every line that is not blank. Lines end at newlines alone."""
    with stored.opened() as file:
        for number, data in enumerate(file, 1):
            where = f"{stored.where} line {number}"
            line = decode(data, where)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as e:
                raise UserError(
                    f"{where}: malformed JSON ({e.msg} at column {e.colno}); valid: one object a line"
                ) from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: found {type(record).__name__}; valid: one JSON object a line")
            yield number, record


def _json(stored: Stored) -> Iterator[tuple[int, Row]]:
    """(number, object) of a list of objects, of one object, or of lines of objects, which some such files hold."""
    with stored.opened() as file:
        head = b""
        while not head and (data := file.read(max(_CHUNK, 3))):
            head = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        with stored.opened() as file:
            yield from _list(file, stored.where)
        return
    with stored.opened() as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        json.loads(first)
    except ValueError:  # not a line of its own: one object, or neither
        with stored.opened() as file:
            data = file.read()
        try:
            whole = json.loads(decode(data, stored.where))
        except json.JSONDecodeError:
            pass
        else:
            if not isinstance(whole, dict):
                raise UserError(
                    f"{stored.where} entry 1: found {type(whole).__name__}; valid: a list of objects"
                ) from None
            yield 1, whole
            return
    yield from _lines(stored)


def _list(file: BinaryIO, where: str) -> Iterator[tuple[int, Row]]:
    """(number, object) of a list of objects, which is read as far as the object that is asked for."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    place = f"{where} entry 1"
    try:
        for number, value in enumerate(_values(text), 1):
            place = f"{where} entry {number}"
            if not isinstance(value, dict):
                raise UserError(f"{place}: found {type(value).__name__}; valid: a list of objects")
            yield number, value
            place = f"{where} entry {number + 1}"
    except json.JSONDecodeError as e:
        raise UserError(f"{place}: malformed JSON ({e.msg}); valid: a list of objects") from None
    except UnicodeDecodeError as e:
        byte = e.object[e.start] if isinstance(e.object, bytes) else 0
        raise UserError(f"{place} or soon after it: a byte (0x{byte:02x}) is not UTF-8; valid: UTF-8 text") from None
    finally:
        text.detach()


def _values(text: TextIO) -> Iterator[object]:
    """The values of a list. Raises ``JSONDecodeError`` where it is none."""
    decoder, buffer, at, begun, needs = json.JSONDecoder(), "", 0, False, ""
    while True:
        at = _space(buffer, at)
        if at == len(buffer):
            buffer, at = text.read(_CHUNK), 0
            if not buffer:
                raise json.JSONDecodeError("the list does not end", buffer, 0)
            continue
        if not begun:
            begun, at = True, at + 1  # "["
        elif buffer[at] == "]" and needs != "value":
            break
        elif needs == "comma":
            if buffer[at] != ",":
                raise json.JSONDecodeError("expecting ',' or ']'", buffer, at)
            at, needs = at + 1, "value"
        else:
            try:
                value, at = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as e:
                torn = e.pos >= len(buffer) - 12 or e.msg.startswith("Unterminated string")
                more = text.read(max(_CHUNK, len(buffer) - at)) if torn else ""
                if not more:
                    raise
                buffer, at = buffer[at:] + more, 0
                continue
            needs = "comma"
            yield value
    rest = buffer[at + 1 :]
    while rest:
        if _space(rest, 0) < len(rest):
            raise json.JSONDecodeError("text behind the list", rest, 0)
        rest = text.read(_CHUNK)


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _parquet(stored: Stored, field: str, more: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """(row, its fields), row group by row group."""
    where = stored.where
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{where}: reading it needs the library pyarrow; get it with: pip install 'decoder-lab[data]'")
    import pyarrow
    from pyarrow import parquet

    with stored.opened() as opened, tempfile.TemporaryFile() as unpacked:
        if stored.compressed:  # the format is read from its end, which a compressed stream cannot be
            shutil.copyfileobj(opened, unpacked, _CHUNK)
        number = 0
        try:
            source = unpacked if stored.compressed else opened
            file = parquet.ParquetFile(source, buffer_size=_CHUNK, pre_buffer=False)
            columns = _columns(where, field, more, file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
        except (pyarrow.ArrowException, OSError) as e:
            said = (str(e).splitlines() or [type(e).__name__])[0]
            after = f" after row {number}" if number else ""
            raise UserError(f"{where}: not a Parquet file{after} ({said})") from None


def _columns(where: str, field: str, more: Sequence[str], names: Sequence[str]) -> list[str]:
    column = field if field in names else field.partition(".")[0]
    if column not in names:
        raise UserError(
            f"{where}: field {field!r} is missing{nearest(column, names)}; fields present: {', '.join(names[:12])}"
        )
    return [column, *(name for name in more if name in names)]
