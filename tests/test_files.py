"""Files appear whole or not at all; nested settings are compared by their first difference."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lm.errors import UserError
from lm.files import new_folder, write_json, write_text
from lm.nested import difference, flat


def test_a_write_that_fails_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "whole\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text() == "whole\n" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    """Each writes to a file of its own until its rename, also two threads of one process."""
    path = tmp_path / "a.txt"
    texts = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(path, text), texts * 4))
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path] and path.stat().st_mode & 0o777 == 0o644


def test_json_as_it_stands_in_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1]})
    assert (tmp_path / "a.json").read_bytes() == b'{\n "\\u00e9": [\n  1\n ]\n}\n'
    write_json(tmp_path / "b.json", {"é": [1]}, indent=2, ascii_only=False)
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"é": [1]}
    assert "é" in (tmp_path / "b.json").read_text(encoding="utf-8")


def test_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new") as swap:
        (swap / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "new") as swap:
        (swap / "a").write_text("whole")
    assert (tmp_path / "new" / "a").read_text() == "whole" and (tmp_path / "new").stat().st_mode & 0o777 == 0o755
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "new"):
        pass


def test_the_first_difference() -> None:
    a = {"x": {"y": 1, "z": [2]}, "w": 0}
    assert difference(a, {**a, "w": 5}, "model") == ("model.w", 0, 5)
    assert difference(a, {**a, "x": {"y": 1, "z": [3]}}, "model") == ("model.x.z", [2], [3])
    assert difference(a, {**a, "v": 1}, "model") == ("model.v", None, 1)
    assert difference(a, {"x": {"y": 1}, "w": 0}, "model", absent="absent") == ("model.x.z", [2], "absent")
    assert flat(a, "layer 0 ") == {"layer 0 x.y": 1, "layer 0 x.z": [2], "layer 0 w": 0}
