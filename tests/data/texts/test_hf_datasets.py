"""Hugging Face datasets from folders of every kind, offline, and one line for every kind of mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from lm.data import texts
from lm.data.texts import __main__ as command
from lm.data.texts import hf_datasets
from lm.errors import UserError

ROWS = {
    "text": ["in the beginning", "", "día\ntwo"],
    "meta": [{"body": f"body {i}", "year": i} for i in range(3)],
    "title": ["a", "b", "c"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps an Arrow copy of the files it reads, here not with those of the user."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def found(spec: str) -> list[str]:
    return [d.text for d in texts.documents(spec)]


def refused(spec: str, *words: str) -> None:
    with pytest.raises(UserError) as e:
        texts.documents(spec)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value), str(e.value)


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    info = datasets.DatasetInfo(license="CC0", homepage="https://example.org")
    rows = datasets.Dataset.from_dict(ROWS, info=info)
    rows.save_to_disk(tmp_path / "one")
    documents = texts.documents(f"hf:{tmp_path / 'one'}")
    assert [d.text for d in documents] == ["in the beginning", "día\ntwo"]  # the empty one is left out
    assert documents[1].name == f"hf:{tmp_path / 'one'}:train[2]"
    assert documents[0].licence == "CC0" and documents[0].source == "https://example.org"
    assert found(f"hf:{tmp_path / 'one'}#meta.body") == ["body 0", "body 1", "body 2"]
    refused(f"hf:{tmp_path / 'one'}:test", "no split 'test'", "valid: train")
    refused(f"hf:{tmp_path / 'one'}#meta.year", "found int; valid: a string")
    refused(f"hf:{tmp_path / 'one'}#meta.bdy", "did you mean 'body'")
    refused(f"hf:{tmp_path / 'one'}#titel", "no field 'titel' (did you mean 'title'?)", "fields: text, meta, title")
    refused(f"hf:{tmp_path / 'onne'}", "no such folder (did you mean 'one'?)")


def test_splits_saved_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"body": ROWS["text"]})
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "d")
    assert found(f"hf:{tmp_path / 'd'}:test") == ["día\ntwo"]  # the only field of strings
    assert found(f"hf:{tmp_path / 'd'}") == ["in the beginning", "día\ntwo"]
    refused(f"hf:{tmp_path / 'd'}:tests", "no split 'tests' (did you mean 'test'?); valid: train, test")
    refused(f"hf:{tmp_path / 'd'}:test#x", "no field 'x'")
    (tmp_path / "d" / "test" / "data-00000-of-00001.arrow").write_bytes(b"no data")
    refused(f"hf:{tmp_path / 'd'}:test", "cannot be read")


def test_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "files" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    assert found("hf:./files") == ["in the beginning", "día\ntwo"]
    assert found("hf:./files:train[:1]#title") == ["a"] and found("hf:./files:train[1:]#title") == ["b", "c"]
    refused("hf:./files:valid", "hf:./files:valid cannot be read", 'Unknown split "valid"')
    refused("hf:./files:train[1:2]", "field 'text' of all 1 examples is empty")
    (tmp_path / "lines").mkdir()
    lines = [json.dumps({"n": i, "a": "x", "b": "y"}) for i in range(2)]
    (tmp_path / "lines" / "train.jsonl").write_text("\n".join(lines))
    refused("hf:./lines", "has no field 'text'", "fields: n, a, b", "#field")
    assert found("hf:./lines#b,hf:./files#title") == ["y", "y", "a", "b", "c"]  # specs are joined as all others
    (tmp_path / "empty").mkdir()
    refused("hf:./empty", "hf:./empty:train cannot be read")


def test_streams_are_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no copy of the dataset is made before the first."""
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "files" / "train.parquet")
    (tmp_path / "lines").mkdir()
    lines = [json.dumps({"n": i, "body": text}) for i, text in enumerate(ROWS["text"])]
    (tmp_path / "lines" / "train.jsonl").write_text("\n".join(lines))
    for spec in (f"hf:{tmp_path / 'files'}#title", f"hf:{tmp_path / 'files'}", f"hf:{tmp_path / 'lines'}"):
        streamed = texts.documents(f"{spec}?streaming")
        assert not list((tmp_path / "cache").rglob("*.arrow"))
        assert texts.documents(f"{spec}?streaming&take=1") == streamed[:1]
        assert not list((tmp_path / "cache").rglob("*.arrow"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "copy")
        assert texts.documents(spec) == streamed and texts.documents(f"{spec}?take=1") == streamed[:1]
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = f"hf:{tmp_path / 'files'}"
    refused(f"{files}?steaming", "unknown option 'steaming' (did you mean 'streaming'?)")
    refused(f"{files}?take=0", "unknown option 'take=0'")
    refused(f"{files}:train[:1]?streaming", "files:train[:1] cannot be read")
    refused(f"hf:{tmp_path / 'lines'}?streaming#titel", "unknown option 'streaming#titel'")
    refused(f"hf:{tmp_path / 'lines'}#titel?streaming", "has no field 'titel'", "fields: n, body")
    with (tmp_path / "lines" / "train.jsonl").open("a") as file:
        file.write('\n{"n": 3, "body"')
    refused(f"hf:{tmp_path / 'lines'}?streaming", "cannot be read")


def test_the_hub_is_not_asked_when_offline() -> None:
    program = """
import socket, sys
def refuse(*a, **k):
    sys.exit("asked the network")
socket.socket.connect = socket.getaddrinfo = refuse
from lm.data import texts
from lm.errors import UserError
for spec in ("hf:nobody/nothing", "hf:nobody/nothing/config:test#body", "hf:nothing"):
    try:
        texts.documents(spec)
    except UserError as e:
        print(e)
"""
    env = {**os.environ, "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("cannot be read" in line and "ffline" in line for line in lines)
    assert "hf:nobody/nothing/config:test cannot be read" in lines[1]


def test_names_are_passed_on_as_the_library_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, name: str | None, split: str, streaming: bool) -> datasets.Dataset:
        asked.append((path, name, split, streaming))
        return datasets.Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec in ("hf:imdb", "hf:owner/name:test", "hf:owner/name/config:train[:2%]"):
        assert len(texts.documents(spec)) == 2
    assert asked == [
        ("imdb", None, "train", False),
        ("owner/name", None, "test", False),
        ("owner/name", "config", "train[:2%]", False),
    ]
    assert [d.name for d in texts.documents("hf:imdb:test#title?streaming&take=2")] == [
        "hf:imdb:test[0]",
        "hf:imdb:test[1]",
    ]
    assert asked[-1] == ("imdb", None, "test", True)


def test_specs_that_name_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("hf:", "names no member")
    refused("hf:#text", "'hf:#text' is not a dataset", "hf:./FOLDER")
    refused("hf:a/b/c/d", "'hf:a/b/c/d' is not a dataset")
    refused("hf:a//c", "is not a dataset")
    refused("hg:name", "unknown source")
    monkeypatch.setattr(hf_datasets.importlib.util, "find_spec", lambda name: None)
    refused("hf:imdb", "needs a package that is not here", "pip install datasets")
    assert not hf_datasets.installed()


def test_the_table_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("hf "))
    assert row.split()[1] == "yes" and hf_datasets.HOW_TO_GET in row
