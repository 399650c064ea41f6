"""Rows of files come one at a time: the first after a piece of the file, and none stays when the next is asked for."""

from __future__ import annotations

import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from lm.data.texts import rows
from lm.data.texts.stored import Stored, local
from lm.errors import UserError

SIZE, N = 2**12, 512  # characters of a row, rows


def parquet_file(path: Path, records: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=16, compression="none")


def dumped(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode(), 1) if path.suffix == ".gz" else text.encode())


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "a.jsonl": lambda path, records: dumped(path, "\n".join(json.dumps(r) for r in records)),
    "a.jsonl.gz": lambda path, records: dumped(path, "\n".join(json.dumps(r) for r in records)),
    "a.json": lambda path, records: dumped(path, json.dumps(records)),
    "b.json": lambda path, records: dumped(path, json.dumps(records, indent=1)),
    "lines.json": lambda path, records: dumped(path, "\n".join(json.dumps(r) for r in records)),
    "a.parquet": parquet_file,
}


def records() -> list[dict[str, Any]]:
    return [{"text": random.Random(i).randbytes(SIZE // 2).hex(), "n": i} for i in range(N)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_never_in_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK", 2**15)
    monkeypatch.setattr(rows, "_BATCH", 16)
    path = tmp_path / name
    WRITERS[name](path, records())
    read = []

    class Counted(io.FileIO):
        def readinto(self, into: Any) -> int | None:
            read.append(super().readinto(into) or 0)
            return read[-1]

        def read(self, n: int = -1) -> bytes | None:  # type: ignore[override]
            data = super().read(n)
            read.append(len(data or b""))
            return data

    stored = Stored(str(path), name, lambda: cast(BinaryIO, io.BufferedReader(Counted(str(path)))))
    found = rows.objects(stored, "text", ("n",))
    assert next(found)[2] == records()[0]
    assert sum(read) < path.stat().st_size / 4
    tracemalloc.start()
    count, last = 1, ""
    for number, where, record in found:
        count, last = count + 1, where
        assert number == count and record["n"] == count - 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == N and last.endswith(f" {N}")
    assert peak < SIZE * N / 4  # of 2 MiB of text


LIST = '[{"text": "a"}, {"text": "b]"} ,\n{"text": "c"}]'


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_lists_are_read_alike_in_pieces_of_any_size(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    for text in (LIST, f" \ufeff{LIST}"[1:] + "\n ", json.dumps(json.loads(LIST), indent=3)):
        path.write_text(text)
        assert [(n, r["text"]) for n, _, r in rows.objects(local(path, "a.json"), "text")] == [
            (1, "a"),
            (2, "b]"),
            (3, "c"),
        ]
    path.write_text("[ ]")
    assert list(rows.objects(local(path, "a.json"), "text")) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LIST[:-1], "a.json entry 4: malformed JSON (the list does not end)"),
        (LIST[:-8], "a.json entry 3: malformed JSON"),
        (LIST.replace(" ,\n", "\n"), "a.json entry 3: malformed JSON (expecting ',' or ']')"),
        (LIST + "x", "a.json entry 4: malformed JSON (text behind the list)"),
        (LIST.replace('"b]"', "b"), "a.json entry 2: malformed JSON"),
        (LIST.replace('{"text": "c"}', ""), "a.json entry 3: malformed JSON"),
        (LIST.replace('{"text": "c"}', "7"), "a.json entry 3: found int; valid: a list of objects"),
        ("3", "a.json line 1: found int; valid: one JSON object a line"),
        ('{"a": 1}\n{"a"', "a.json line 2: malformed JSON"),
        ('{"a":\n 1', "a.json line 1: malformed JSON"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "a.json entry 1 or soon after it: a byte (0xff) is not UTF-8"),
        (b'{"text": "a"}\n{"text": "\xff"}', "a.json line 2: byte offset 10 (0xff) is not UTF-8"),
    ],
)
def test_faults_name_their_place(text: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as e:
        list(rows.objects(local(path, "a.json"), "text"))
    assert words in str(e.value)


def test_a_fault_late_in_a_file_comes_after_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in records()).encode())[:-9])
    found = rows.objects(local(path, path.name), "text")
    assert next(found)[0] == 1
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be decompressed .* valid: a complete \.gz file"):
        list(found)


def test_a_page_of_parquet_that_is_torn_names_the_row_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BATCH", 16)
    path = tmp_path / "a.parquet"
    parquet_file(path, records())
    data = path.read_bytes()
    at = data.index(records()[100]["text"][:64].encode()) - 64
    path.write_bytes(data[:at] + b"\xff" * 128 + data[at + 128 :])
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file after row (8|9)\d "):
        list(rows.objects(local(path, path.name), "text"))
