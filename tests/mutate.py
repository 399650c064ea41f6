"""`make mutants`: breaks the code a line at a time, on a copy, and asks whether a test notices.

``python tests/mutate.py [SOCKET ...] [--list] [--sample N] [--only TEXT]`` reads ``tests/mutants/SOCKET.toml``, whose
entries are

    [[mutant]]
    why = "a window is one token too wide"
    file = "lm/attention/masks.py"
    old = "k > q - self.width"
    new = "k >= q - self.width"
    tests = ["tests/attention/test_masks.py"]      # without: those that `make check` takes for the file

`old` is to occur exactly once in the file: "anchor not found" and "anchor found n times" are errors, which ``--list``
finds without running a test. A mutant is *noticed* when a test fails (or does not end in time), *survives* when all
pass, is *broken* when the tests cannot even be collected, and *unsound* when they fail without it. The exit code is 1
unless every one is noticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import check

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "mutants"
SECONDS = 900.0  # a mutant whose tests take longer hangs, which is noticed
COMPILED = Path(".cache") / "tests" / "compiled"


@dataclass(frozen=True)
class Mutant:
    socket: str
    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    def wrong(self) -> str:
        """Why it cannot be applied; empty where it can."""
        path = ROOT / self.file
        if not path.is_file():
            return f"{self.file}: no such file"
        n = path.read_text(encoding="utf-8").count(self.old)
        if n != 1:
            return f"{self.file}: anchor {'not found' if n == 0 else f'found {n} times'}: {self.old!r}"
        missing = [test for test in self.tests if not (ROOT / test.split("::")[0]).is_file()]
        return f"no such test: {', '.join(missing)}" if missing else ""

    def noticing(self) -> list[str]:
        """The tests that must notice: of the mutant, or by the rule of `make check` without those that always run."""
        return list(self.tests) or [test for test in check.chosen([self.file])[0] if test not in check.ALWAYS]


def mutants(sockets: list[str]) -> list[Mutant]:
    """All of the named files, or of every file."""
    there = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
    unknown = sorted(set(sockets) - set(there))
    if unknown:
        sys.exit(f"error: no mutants of {', '.join(unknown)}; valid: {', '.join(there)}")
    out = []
    for name in sockets or there:
        for entry in tomllib.loads(there[name].read_text(encoding="utf-8"))["mutant"]:
            out.append(Mutant(name, **{**entry, "tests": tuple(entry.get("tests", ()))}))
    return out


def copy(folder: Path) -> None:
    """What git tracks or would track; the environment and the compiled programs of tests, as links where they can."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if (ROOT / ".venv").is_dir():
        (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    if (ROOT / COMPILED).is_dir():
        shutil.copytree(ROOT / COMPILED, folder / COMPILED, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def passes(tests: tuple[str, ...], folder: Path) -> int:
    """pytest's exit code on the copy in `folder`; 1 for tests that do not end."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 1
    if done.returncode not in (0, 1):
        print(done.stdout[-1500:], done.stderr[-500:], flush=True)
    return done.returncode


def tried(mutant: Mutant, folder: Path, sound: dict[tuple[str, ...], bool]) -> str:
    """``noticed | survived | broken | unsound``, of the copy in `folder`. `sound`: what is known of tests without any
    mutation, which must pass."""
    tests = tuple(mutant.noticing())
    if tests not in sound:
        sound[tests] = passes(tests, folder) == 0
    if not sound[tests]:
        return "unsound"
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return {0: "survived", 1: "noticed"}.get(passes(tests, folder), "broken")
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="breaks the code a line at a time")
    parser.add_argument("sockets", nargs="*", help="files of tests/mutants, without .toml (default: all)")
    parser.add_argument("--list", action="store_true", help="only look whether each can be applied")
    parser.add_argument("--sample", type=int, default=0, help="so many of every file, evenly spaced (default: all)")
    parser.add_argument("--only", default="", help="those whose reason has this text in it")
    args = parser.parse_args()
    chosen = [mutant for mutant in mutants(args.sockets) if args.only in mutant.why]
    if args.sample:
        of = {m.socket: [n for n in chosen if n.socket == m.socket] for m in chosen}
        chosen = [m for many in of.values() for m in many[:: -(-len(many) // args.sample)]]
    errors = [f"{m.socket}: {m.why}: {m.wrong()}" for m in chosen if m.wrong()]
    errors += [f"{m.socket}: {m.why}: no test for {m.file}" for m in chosen if not m.wrong() and not m.noticing()]
    print("\n".join(f"error: {error}" for error in errors))
    if args.list or errors:
        for m in chosen:
            print(f"{m.socket:12} {m.file:36} {m.why}  [{' '.join(m.noticing())}]")
        return 1 if errors else 0
    found: dict[str, int] = {}
    sound: dict[tuple[str, ...], bool] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        copy(Path(name))
        for mutant in chosen:
            start = time.monotonic()
            result = tried(mutant, Path(name), sound)
            found[result] = found.get(result, 0) + 1
            seconds = time.monotonic() - start
            print(f"{result:9} {mutant.socket:12} {seconds:5.0f} s  {mutant.file:36} {mutant.why}", flush=True)
    print(", ".join(f"{n} {result}" for result, n in sorted(found.items())))
    return 0 if set(found) <= {"noticed"} else 1


if __name__ == "__main__":
    sys.exit(main())
