"""Malformed configs and command lines by the hundred: each ends well, or in one line with nothing written.

The nightly run draws ten thousand, by another seed every time that the code changes its number of lines.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import forks
import hostile
import judged
import pytest

from experiments.commands.listing import SOCKETS
from lm.config import ModelConfig, build
from lm.errors import UserError
from lm.plug import table
from lm.train.config import DataConfig, TrainConfig
from lm.train.samples import Samples

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="the sandbox's checkpoint needs tokenizers"
)


@pytest.fixture(scope="module")
def ask() -> Iterator[forks.Server]:
    with forks.Server() as server:
        yield server


@needs_tokenizers
def test_nothing_ends_in_a_traceback(ask: forks.Server, tmp_path: Path) -> None:
    n, bad, passed = judged.counted(ask, tmp_path / "box", hostile.cases(20, 600, tmp_path / "box"))
    assert n == 600
    assert bad == []
    assert passed == []


@needs_tokenizers
@pytest.mark.nightly
def test_nothing_ends_in_a_traceback_ten_thousand_times(ask: forks.Server, tmp_path: Path) -> None:
    lines = sum(len(p.read_bytes().splitlines()) for p in (forks.ROOT / "lm").rglob("*.py"))
    n, bad, passed = judged.counted(ask, tmp_path / "box", hostile.cases(lines, 10_000, tmp_path / "box"))
    assert n == 10_000
    assert bad == []
    assert passed == []


def test_what_counts_as_wrong() -> None:
    """Every way to end badly is seen, so that a list without any says something."""
    good = forks.Ended(2, "", "error: x\n", 0.0)
    assert (
        judged.wrong("run", good, set()) is None
        and judged.wrong("run", forks.Ended(0, "fine", "", 0.0), {"new"}) is None
    )
    for change in (
        {"code": None}, {"code": 120}, {"err": "Traceback (most …"}, {"err": "error: x\nerror: y\n"}, {"err": "oh\n"},
        {"out": "first"}, {"err": "error: " + "x" * 2000 + "\n"}, {"code": 0}, {"code": 1, "err": ""},
    ):  # fmt: skip
        assert judged.wrong("run", dataclasses.replace(good, **change), set()) is not None, change
    assert judged.wrong("run", good, {"new"}) is not None


def numbers() -> Iterator[tuple[type, str]]:
    """Every field that takes a float, of every plug and of what is no plug."""
    classes = {cls for module in SOCKETS.values() for cls in table(module).values()}
    classes |= {ModelConfig, TrainConfig, DataConfig, Samples, type(TrainConfig().mesh)}
    for cls in sorted(classes, key=lambda c: c.__qualname__):
        for name, hint in typing.get_type_hints(cls).items():
            fields = {f.name for f in dataclasses.fields(cls)}
            if name in fields and (hint is float or float in typing.get_args(hint)):
                yield cls, name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e12, -1e12])
def test_no_number_is_none(value: float) -> None:
    """Refused by the one place that reads values; fields of lists too."""
    found = list(numbers())
    assert len(found) > 50
    for cls, name in found:
        given = (value,) if typing.get_origin(typing.get_type_hints(cls)[name]) is tuple else value
        with pytest.raises(UserError, match=rf"key\.{name}.*valid: a finite number|expected"):
            build(cls, {name: given}, "key")


def test_the_server_stands_a_command_that_ends_badly(ask: forks.Server, tmp_path: Path) -> None:
    """One that never ends is ended, one that leaves at once is told; the next one runs."""
    for code, said in (("while True: pass", None), ("import os; os._exit(77)", 77)):
        (tmp_path / "bad.py").write_text(code)
        assert ask("run", ["--config=bad.py", "--dry-run"], tmp_path, 2.0).code == said
        ended = ask("lab", ["--help"], tmp_path)
        assert ended.code == 0 and "new_method" in ended.out, ended.err


@pytest.mark.parametrize(("output", "code"), [(">&-", 0), ("> /dev/full", 1), ("| head -c 1 > /dev/null", 0)])
def test_outputs_that_take_nothing(output: str, code: int, tmp_path: Path) -> None:
    """A process of its own: what the interpreter says at its end is part of it."""
    line = f"set -o pipefail; {sys.executable} -m experiments.lab --help {output}"
    ended = subprocess.run(["bash", "-c", line], cwd=forks.ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code and ended.stderr.count("\n") == code
    assert not code or ended.stderr.startswith("error: ")


def test_output_in_ascii(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-m", "experiments.lab", "caf\udce9"]
    ended = subprocess.run(line, cwd=forks.ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert (ended.returncode, ended.stdout) == (2, "") and "is not UTF-8" in ended.stderr
    line = [sys.executable, "-c", "import sys; from experiments import cli; sys.exit(cli.main(lambda a: print('é…')))"]
    ended = subprocess.run(line, cwd=forks.ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\\xe9\\u2026\n", "")
