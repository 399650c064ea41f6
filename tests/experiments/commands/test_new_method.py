"""A new method's files: they fail with instructions, and filled they pass `make check`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import new_method
from experiments.commands.new_method import SOCKETS
from experiments.spec import registry

ENV = {**os.environ, "JAX_PLATFORMS": "cpu"}
ENV.pop("JAX_COMPILATION_CACHE_DIR", None)


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of Python in a copy."""
    env = {**ENV, "PYTHONPATH": os.pathsep.join([str(folder), ENV.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What git tracks, as a repository of its own, with the compiled programs of tests."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=registry.ROOT, capture_output=True)
    copy = tmp_path / "copy"
    for name in listed.stdout.decode().splitlines():
        if (registry.ROOT / name).is_file() and not name.startswith("results/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(registry.ROOT / name, copy / name)
    for cache in (Path(".cache/tests/compiled"), Path(".mypy_cache")):
        if (registry.ROOT / cache).is_dir():
            shutil.copytree(registry.ROOT / cache, copy / cache)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "start"]):
        subprocess.run(["git", *words], cwd=copy, check=True)
    return copy


def replaced(path: Path, *pairs: tuple[str, str]) -> None:
    """Every pattern once."""
    text = path.read_text(encoding="utf-8")
    for pattern, new in pairs:
        text, n = re.subn(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
        assert n == 1, pattern
    path.write_text(text, encoding="utf-8")


def test_it_writes_four_and_says_what_is_missing(folder: Path) -> None:
    made = command(folder, "-m", "experiments.new_method", "every_other", "--socket=pattern", "--arxiv=2310.06825")
    assert made.returncode == 0, made.stderr
    status = subprocess.run(["git", "status", "--short"], cwd=folder, capture_output=True, text=True, check=True).stdout
    files = ("lm/patterns/every_other.py", "configs/every_other.py", "tests/patterns/test_every_other.py")
    assert sorted(status.split("\n")) == sorted(["", " M lm/patterns/__init__.py", *(f"?? {name}" for name in files)])
    failed = command(folder, "-m", "pytest", "-q", "-n0", files[2])
    assert failed.returncode == 1
    for words in (
        "lm/patterns/every_other.py: write branches",
        "tests/patterns/test_every_other.py: say what PlugCase asks for",
        "tests/patterns/test_every_other.py: compare with NumPy",
    ):
        assert words in failed.stdout
    again = command(folder, "-m", "experiments.new_method", "every_other", "--socket=pattern")
    assert again.returncode == 2 and "lm.patterns has 'every_other' already" in again.stderr


@pytest.mark.nightly
def test_filled_it_passes(folder: Path) -> None:
    """A window under another name, as a newcomer would write it: four holes, and `make check` is content."""
    assert command(folder, "-m", "experiments.new_method", "near", "--socket=pattern").returncode == 0
    replaced(
        folder / "lm/patterns/near.py",
        (r"raise NotImplementedError\(.*?\)\n", "return (Branch(Causal() & Window(self.w)),)\n"),
        ("import AnyBranch, Context", "import AnyBranch, Branch, Context"),
        ("from lm.patterns.base", "from lm.attention.masks import Causal, Window\nfrom lm.patterns.base"),
        ("    def branches", "    w: int = 4096\n\n    def branches"),
    )
    claim = 'm = {arm: r.mean(arm, "nll/nll_inside") for arm in ("baseline", "near")}\n'
    claim += '        return abs(m["near"] - m["baseline"]) < 1e-3, m\n'
    replaced(folder / "configs/near.py", (r"raise NotImplementedError\(.*?\)\n", claim))
    oracle = "seen = model.influence(TestNear().cfg, TestNear().params, 20)\n"
    oracle += "    assert (np.flatnonzero(seen) == np.arange(20 - 2 * 6, 21)).all()  # through two layers\n"
    replaced(
        folder / "tests/patterns/test_near.py",
        ('{"name": "near"}', '{"name": "near", "w": 7}'),
        (r"limits = \(\)", 'limits = ({"pattern": {"name": "near", "w": T}},)'),
        (r"\n    def test_it_is_declared.*?delete this test.\)\n", ""),
        (r"pytest.fail\(.*?equations.\)\n", oracle),
        (
            "import pytest\nfrom",
            "import numpy as np\nimport pytest\nfrom cases import model\nfrom cases.model import T\nfrom",
        ),
    )
    command(folder, "-m", "ruff", "format", "-q", "lm", "tests", "configs")
    checked = command(folder, "tests/check.py")
    command(folder, "-m", "mypy.dmypy", "--status-file", ".cache/dmypy.json", "stop")  # it would stay for next time
    assert checked.returncode == 0, checked.stdout[-4000:] + checked.stderr[-2000:]
    assert "TestNear" in checked.stdout or "tests/patterns/test_near.py" in checked.stdout


def test_every_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written for every socket is Python that imports; nothing is written here."""
    from experiments.commands.new_method import written

    for socket in SOCKETS:
        made = written("zebra", socket, "")
        assert len(made) == 4
        for path, text in made.items():
            compile(text, str(path), "exec")
            assert path.name == "__init__.py" or not path.exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["streaming", "--socket=pattern"], "NAME: lm.patterns has 'streaming' already"),
        (["x", "--socket=patern"], "--socket: unknown name 'patern' (did you mean 'pattern'?)"),
        (["Near", "--socket=pattern"], "NAME: found 'Near'; valid: lower-case letters"),
        (["lora", "--socket=pattern"], "configs/lora.py: exists already"),
        (["near"], "the following arguments are required: --socket"),
    ],
)
def test_mistakes(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert new_method.main(words) == 2
    assert error in capsys.readouterr().err
