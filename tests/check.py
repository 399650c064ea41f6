"""`make check`: linter, types, and the tests of what changed, in minutes.

``python tests/check.py [--base REF] [--list]`` looks at the files that differ from REF (HEAD) and at untracked ones.

* ``lm/x/y.py`` -> ``tests/x/test_y.py``; where there is none, the tests of the folder that name the module, or else all
  tests of the folder. Beside these the generic suites (classes with a `change`) that name a plug of the file.
* What every test rests on (the model, attention, the configuration, the suites) -> the tests marked `smoke`.
* ``kernels_pallas/x`` -> ``tests/kernels/test_x*.py``; ``experiments/x/y.py`` -> ``tests/experiments/x/test_y.py`` by
  the same rule; ``configs`` -> the smoke runs.
* Always the plan of the house and the configuration.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("lm", "experiments", "configs", "kernels_pallas", "benchmarks")
ALWAYS = ("tests/test_house.py", "tests/test_config.py")
CORE = ("lm/model/", "lm/attention/", "lm/mixers/", "lm/config.py", "lm/plug.py", "lm/compat.py", "tests/cases/")
SETTINGS = ("pyproject.toml", "tests/conftest.py", "tests/programs.py")
SMOKE = (  # the files with tests marked `smoke`
    "tests/patterns/test_generic.py",
    "tests/ffn/test_feed_forward.py",
    "tests/test_composition.py",
    "tests/sharding/test_layouts.py",
    "tests/train/test_step.py",
)


def changed(base: str) -> list[str]:
    """Files that differ from `base`, deleted ones too, and untracked ones."""
    names: list[str] = []
    for args in (("diff", "--name-only", base), ("ls-files", "--others", "--exclude-standard")):
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: git {' '.join(args)}: {done.stderr.strip()}")
        names += done.stdout.split("\n")
    return sorted({name for name in names if name and not _only_rows(name, base)})


def _only_rows(name: str, base: str) -> bool:
    """Whether all that differs in a socket's table are rows: the files that they name have the tests."""
    if not re.fullmatch(r"lm/.*__init__\.py", name):
        return False
    args = ["git", "diff", "-U0", base, "--", name]
    text = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    lines = [line[1:].strip() for line in text.split("\n") if re.match(r"[-+](?![-+])", line)]
    row = r'(TABLE = Table\()?[({]*("\w+": "[\w.]+:\w+",?)?[)}]*'
    return bool(lines) and all(re.fullmatch(row, line) for line in lines)


def tests_of(name: str) -> set[str]:
    """The tests of one file: files and ``file::Class``, relative to the root."""
    path = Path(name)
    if path.suffix != ".py":
        return set()
    top, *folders = path.parent.parts or ("",)
    if top == "tests":
        return {name} if path.name.startswith("test_") and (ROOT / name).is_file() else _beside(path)
    if top == "lm":
        return _mirror(path, ["tests", *folders]) | _cases(name)
    if top == "kernels_pallas":
        kernel = folders[0] if folders else path.stem
        return _files("tests/kernels", f"test_{kernel}*.py") or _files("tests/kernels", "test_*.py")
    if top == "experiments":
        return _mirror(path, ["tests", "experiments", *folders]) or _files("tests/experiments", "test_*.py", deep=True)
    return _files("tests/experiments", "test_smoke.py", deep=True) if top == "configs" else set()


def _mirror(path: Path, folders: list[str]) -> set[str]:
    """Of ``y.py``, in the folders that mirror its own."""
    folder = "/".join(folders)
    found = _files(folder, f"test_{path.stem}.py") if path.name != "__init__.py" else set()
    if found:
        return found
    here = _files(folder, "test_*.py", deep=True)
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    naming = {test for test in here if re.search(rf"\b{re.escape(module)}\b", _text(test))}
    return naming or (here if len(folders) > 1 else set())


def _beside(path: Path) -> set[str]:
    """Tests that import a helper of tests, by its own name."""
    name = re.escape(path.stem)
    line = re.compile(rf"^(from (cases\.)?{name} import|import {name}\b|from cases import .*\b{name}\b)", re.MULTILINE)
    return {test for test in _files("tests", "test_*.py", deep=True) if line.search(_text(test))}


def _cases(name: str) -> set[str]:
    """Generic suites that name a plug which the file defines."""
    module = name.removesuffix(".py").replace("/", ".")
    plugs: set[str] = set()
    for table in ROOT.glob("lm/**/*.py"):
        plugs |= set(re.findall(rf'"(\w+)": "{re.escape(module)}:\w+"', table.read_text(encoding="utf-8")))
    if (ROOT / name).is_file():  # a table beside its plugs
        plugs |= set(re.findall(r'"(\w+)": [A-Z]\w+\b', _text(name)))
    return {case for case, named in _suites() if named & plugs}


@functools.cache
def _suites() -> tuple[tuple[str, set[str]], ...]:
    """(``file::Class``, the words of its settings) for every class with a `change`, a `plug` or an `objective`."""
    return tuple(_found())


def _found() -> Iterator[tuple[str, set[str]]]:
    for test in sorted(_files("tests", "test_*.py", deep=True)):
        for node in ast.parse(_text(test)).body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            words: set[str] = set()
            for item in node.body:
                if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) in ("change", "plug", "objective"):
                    found = (n.value for n in ast.walk(item.value) if isinstance(n, ast.Constant))
                    words |= {value for value in found if isinstance(value, str)}
            if words:
                yield f"{test}::{node.name}", words


@functools.cache
def _files(folder: str, pattern: str, deep: bool = False) -> set[str]:
    place = ROOT / folder
    found = place.rglob(pattern) if deep else place.glob(pattern)
    return {str(path.relative_to(ROOT)) for path in found}


@functools.cache
def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def chosen(names: Iterable[str]) -> tuple[list[str], bool]:
    """The tests of changed files, and whether the smoke set is among them. A class of a file that runs whole is not
    named beside it."""
    names = list(names)
    tests = set(ALWAYS).union(*map(tests_of, names))
    tests = {test for test in tests if "::" not in test or test.split("::")[0] not in tests}
    return sorted(tests), any(name.startswith(CORE) or name in SETTINGS for name in names)


def run(tests: list[str], *flags: str) -> int:
    """pytest's exit code; having nothing to run is no failure."""
    command = [sys.executable, "-m", "pytest", "-q", *flags, *tests]
    print("$", " ".join(command[1:]), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return 0 if code == 5 else code


def lint(names: list[str]) -> int:
    """Linter and formatter on everything, types where code changed: by mypy's server, which stays for next time."""
    commands = [["ruff", "check", "."], ["ruff", "format", "--check", "-q", "."]]
    if any(name.endswith(".py") and name.startswith(CODE) for name in names):
        state = ROOT / ".cache" / "dmypy.json"
        state.parent.mkdir(exist_ok=True)
        commands.append(["mypy.dmypy", "--status-file", str(state), "run", "--timeout", "3600", "--", *CODE])
    return max(subprocess.run([sys.executable, "-m", *c], cwd=ROOT, check=False).returncode for c in commands)


def main() -> int:
    parser = argparse.ArgumentParser(description="the tests of what changed")
    parser.add_argument("--base", default="HEAD", help="what to compare with (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print what would run, and nothing else")
    args = parser.parse_args()
    names = changed(args.base)
    tests, smoke = chosen(names)
    kept = ROOT / ".cache" / "tests" / "durations.json"
    seconds = {file: row["test_s"] for file, row in json.loads(kept.read_text()).items()} if kept.is_file() else {}
    print(f"{len(names)} files differ from {args.base}; their tests{' and the smoke set' if smoke else ''}:")
    for test in tests:
        print(f"  {test}" + (f"  ({seconds[test]:.0f} s last time)" if test in seconds else ""))
    if args.list:
        return 0
    files = {test.split("::")[0] for test in tests}
    many = ("-n", "auto", "--maxprocesses=8", "--dist", "loadfile", "--no-loadscope-reorder") if len(files) > 4 else ()
    codes = [lint(names), run(tests, *many)]
    if smoke:
        codes.append(run([test for test in SMOKE if test not in tests], "-m", "smoke and not nightly"))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
