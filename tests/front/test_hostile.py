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
import pytest
import sandbox

from experiments.commands.listing import SOCKETS
from lm.config import ModelConfig, build
from lm.errors import UserError
from lm.plug import table
from lm.train.config import DataConfig, TrainConfig
from lm.train.samples import Samples

LONGEST = 1500  # characters of a message: a key, what was found, and a list of what is valid
SLOW = 60.0  # seconds until a command counts as endless
needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="the sandbox's checkpoint needs tokenizers"
)


def wrong(command: str, ended: forks.Ended, changed: set[str]) -> str | None:
    """What is wrong with how a command ended; None where nothing is."""
    if ended.code is None:
        return "it does not end"
    if "Traceback" in ended.err + ended.out:
        return "a traceback"
    if ended.code not in (0, 1, 2):
        return f"exit code {ended.code}"
    if ended.code == 2:
        if not ended.err.startswith("error: ") or ended.err.count("\n") != 1:
            return "not one line"
        if len(ended.err) > LONGEST:
            return "a long line"
        if ended.out:
            return "output before the refusal"
        if changed:
            return f"written: {sorted(changed)[:3]}"
    if ended.code == 1 and not ended.err.startswith("error: ") and command not in ("compile", "results_page"):
        return "exit code 1 without an error"
    said = [line for line in ended.err.splitlines() if not line.startswith(("note: ", "as the checkpoint"))]
    if ended.code == 0 and said:
        return f"said beside the output: {said[0]}"
    return None


@pytest.fixture(scope="module")
def ask() -> Iterator[forks.Server]:
    with forks.Server() as server:
        yield server


def counted(
    ask: forks.Server, folder: Path, cases: Iterator[tuple[str, hostile.Case]]
) -> tuple[int, list[str], list[str]]:
    """How many ended, what was wrong with some, and which passed though they must not."""
    n, bad, passed = 0, [], []
    sandbox.build(folder)
    first = sandbox.look(folder)
    for kind, case in cases:
        for name, text in case.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        before = sandbox.look(folder)
        ended = ask(case.command, case.argv, folder, SLOW, **case.more)
        after = sandbox.look(folder)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        n += 1
        if (why := wrong(case.command, ended, changed)) is not None:
            bad.append(f"{kind}: {why}: {case}: {ended.err[-300:]}")
        if case.refuse and ended.code != 2:
            passed.append(str(case))
        if after != first:
            sandbox.again(folder)
            first = sandbox.look(folder)
    return n, bad, passed


@needs_tokenizers
def test_nothing_ends_in_a_traceback(ask: forks.Server, tmp_path: Path) -> None:
    n, bad, passed = counted(ask, tmp_path / "box", hostile.cases(20, 600, tmp_path / "box"))
    assert n == 600
    assert bad == []
    assert passed == []


@needs_tokenizers
@pytest.mark.nightly
def test_nothing_ends_in_a_traceback_ten_thousand_times(ask: forks.Server, tmp_path: Path) -> None:
    lines = sum(len(p.read_bytes().splitlines()) for p in (forks.ROOT / "lm").rglob("*.py"))
    n, bad, passed = counted(ask, tmp_path / "box", hostile.cases(lines, 10_000, tmp_path / "box"))
    assert n == 10_000
    assert bad == []
    assert passed == []


def test_what_counts_as_wrong() -> None:
    """Every way to end badly is seen, so that a list without any says something."""
    good = forks.Ended(2, "", "error: x\n", 0.0)
    assert wrong("run", good, set()) is None and wrong("run", forks.Ended(0, "fine", "", 0.0), {"new"}) is None
    for change in (
        {"code": None}, {"code": 120}, {"err": "Traceback (most …"}, {"err": "error: x\nerror: y\n"}, {"err": "oh\n"},
        {"out": "first"}, {"err": "error: " + "x" * 2000 + "\n"}, {"code": 0}, {"code": 1, "err": ""},
    ):  # fmt: skip
        assert wrong("run", dataclasses.replace(good, **change), set()) is not None, change
    assert wrong("run", good, {"new"}) is not None


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
