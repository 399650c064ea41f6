"""Files at addresses are the documents that the same files are here; one line for each that cannot be had."""

from __future__ import annotations

import functools
import gzip
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lm.data import conversations, texts
from lm.errors import UserError

FILES = {
    "a.txt": b"alpha",
    "b/c.md": b"gamma",
    "b/.d.md": b"hidden",
    ".e/f.txt": b"hidden",
    "g.png": b"\x89PNG\0",
    "rows/h.jsonl": b'{"text": "one", "n": 1}\n\n{"text": "two"}\n',
    "rows/i.jsonl.gz": gzip.compress(b'{"text": "three"}\n'),
    "rows/j.json": b'[{"text": "four"}]',
    "talk.jsonl": b'{"messages": [{"role": "user", "content": "x"}]}\n',
    "torn.jsonl": b'{"text": "one"}\n{"te',
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    memory = fsspec.filesystem("memory")
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
        memory.pipe(f"/lab/{name}", data)
    yield tmp_path
    memory.rm("/lab", recursive=True)


def named(spec: str) -> list[tuple[str, str]]:
    return [(d.name, d.text) for d in texts.stream(spec)]


@pytest.mark.parametrize("name", ["", "/a.txt", "/rows/*.jsonl", "/rows/*.json*", "/**/*.md", "/rows/h.jsonl#text"])
def test_the_same_documents_as_here(name: str, folder: Path) -> None:
    want = named(f"{folder}{name}")
    assert want and named(f"memory://lab{name}") == want and named(f"file://{folder}{name}") == want
    assert named(f"simplecache::memory://lab{name}") == want


def test_parquet_and_conversations_too(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with fsspec.open("memory://lab/k.parquet", "wb") as file:
        parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": "b"}]), file)
    assert named("memory://lab/k.parquet") == [("k.parquet:1", "a"), ("k.parquet:2", "b")]
    (here,), (there,) = (conversations.documents(f"{at}/talk.jsonl") for at in (folder, "memory://lab"))
    assert (here.name, here.text) == (there.name, there.text) and there.source == "memory://lab/talk.jsonl line 1"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "s3://bucket/*.jsonl",
            "s3://bucket/*.jsonl: reading it needs the package s3fs; get it with: pip install s3fs",
        ),
        ("gs://bucket/a.txt", "needs the package gcsfs; get it with: pip install gcsfs"),
        ("simplecache::s3://bucket/a.txt", "needs the package s3fs"),
        ("memry://lab/a.txt", "unknown kind of address 'memry' (did you mean 'memory'?)"),
        ("memory://lab/z.txt", "memory://lab/z.txt: no such file or folder"),
        ("memory://lab/*.z", "the glob 'memory://lab/*.z' matches no file"),
        ("memory://lab/rows", "the folder holds no text file"),
        ("memory://lab#text", "for JSON lines in a folder write memory://lab/*.jsonl#text"),
        ("memory://lab/rows/h.jsonl#n", "memory://lab/rows/h.jsonl line 1: field 'n': found int"),
        ("memory://lab/torn.jsonl", "memory://lab/torn.jsonl line 2: malformed JSON"),
        ("memory://lab/g.png", "memory://lab/g.png: binary file"),
    ],
)
def test_what_cannot_be_had_is_one_line(spec: str, words: str, folder: Path) -> None:
    with pytest.raises(UserError) as e:
        texts.documents(spec)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_conversations_are_no_folder_of_text(folder: Path) -> None:
    with pytest.raises(UserError, match=r"memory://lab/a\.txt: holds no rows with fields"):
        conversations.documents("memory://lab/a.txt")
    with pytest.raises(UserError, match=r"memory://lab/z\.jsonl: no such file"):
        conversations.documents("memory://lab/z.jsonl")


def test_a_connection_that_breaks_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*a: object, **k: object) -> bytes:
        raise RuntimeError("gone\naway")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem._open", broken)
    with pytest.raises(UserError, match=r"^memory://lab/a\.txt: cannot be read \(RuntimeError: gone away\)"):
        texts.documents("memory://lab/a.txt")


def test_web_pages(folder: Path) -> None:
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        assert named(f"{at}/rows/h.jsonl?download=true") == named(f"{folder}/rows/h.jsonl")
        assert named(f"{at}/rows/i.jsonl.gz") == [("i.jsonl.gz:1", "three")]
        with pytest.raises(UserError, match=rf"{at}/z\.txt: (no such file|cannot be)"):
            texts.documents(f"{at}/z.txt")
        server.shutdown()
