"""Files appear whole or not at all; nested settings are compared by their first difference."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lm.errors import UserError
from lm.files import claim_text, new_folder, sum_of_file, summed, without_sum, write_bytes, write_json, write_text
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


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o666, 0o777)])
def test_what_is_written_has_the_users_mode(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "a", b"x")
        assert claim_text(tmp_path / "b", "x")
        with new_folder(tmp_path / "c"):
            pass
    finally:
        os.umask(before)
    assert [(tmp_path / n).stat().st_mode & 0o777 for n in "abc"] == [file, file, folder]


def test_one_of_many_gets_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: claim_text(path, str(i) * 10_000), range(8)))
    assert got.count(True) == 1 and path.read_text() == str(got.index(True)) * 10_000
    assert list(tmp_path.iterdir()) == [path]


def test_sums_tell_what_was_changed() -> None:
    data = {"b": [1.5, None, "é\ud800"], "a": {"2": True}}
    made = summed(data)
    again = json.loads(json.dumps({**dict(reversed(made.items()))}, indent=3))
    assert without_sum(again) == data and without_sum(data) == data  # another layout, no sum
    assert summed({"a": {2: True}})["sum"] == summed({"a": {"2": True}})["sum"]  # as JSON has it
    for changed in ({"b": [1.5, None, "é"]}, {"c": 1}, {"a": {"2": 1}}, {"sum": "0"}, {"b": [1.25, None, "é\ud800"]}):
        assert without_sum({**made, **changed}) is None
    del again["a"]
    assert without_sum(again) is None


def test_the_sum_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sum_of_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()[:32]


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
