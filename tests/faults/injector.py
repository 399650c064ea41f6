"""Damages one file of a folder in a seeded way, reads the folder as the commands do, and says what came of it.

``python tests/faults/injector.py [KIND ...] [--n=300] [--seed=0]`` counts outcomes by kind of folder (with the
``pythonpath`` of the tests). Damage must be told in one line or change nothing that is read.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lm.errors import UserError
from lm.files import write_json

GOOD = ("same", "refused", "mended")
BAD = ("silent", "noise", "traceback")


@dataclass(frozen=True)
class Kind:
    """`folder`: what is damaged, `read`: everything that a command takes from it, as something that compares.

    `spares`: names of files that nobody reads.
    """

    folder: Path
    read: Callable[[], object]
    spares: tuple[str, ...] = ()
    sound: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            self.sound[path.relative_to(self.folder).as_posix()] = path.read_bytes()

    def restore(self) -> None:
        """The folder as it was."""
        here = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        for name in here.keys() - self.sound.keys():
            here[name].unlink()
        for name, data in self.sound.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)


@dataclass(frozen=True)
class Outcome:
    """`what`: one of `GOOD` or `BAD`; `case`: the damage in words; `said`: what was printed or raised."""

    what: str
    case: str
    said: str


def flip(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    return f"bit {bit} of byte {at} flipped", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def byte(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    at, value = rng.randrange(len(data)), rng.randrange(1, 256)
    return f"byte {at} changed", data[:at] + bytes([data[at] ^ value]) + data[at + 1 :]


def typo(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A letter or digit becomes another: what stays valid JSON."""
    places = [i for i, b in enumerate(data) if chr(b).isalnum()] or [0]
    at = rng.choice(places)
    letters = b"0123456789" if chr(data[at]).isdigit() else b"abcdefghijklmnopqrstuvwxyz"
    new = rng.choice([b for b in letters if b != data[at]])
    return f"{chr(data[at])!r} at {at} becomes {chr(new)!r}", data[:at] + bytes([new]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    at = rng.randrange(len(data))
    return f"cut off at {at}", data[:at]


def blank(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    at, n = rng.randrange(len(data)), rng.choice((1, 8, 64, 512))
    return f"{n} zeros at {at}", data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def line(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A line is lost."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return f"line {at} lost", b"".join(lines[:at] + lines[at + 1 :])


WAYS = (flip, byte, typo, typo, cut, blank, line)


def cases(kind: Kind, n: int, seed: int) -> Iterator[tuple[str, str, bytes | None]]:
    """(damage in words, file, its new contents; None = it is gone), `n` of them."""
    rng = random.Random(seed)
    names = [name for name, data in kind.sound.items() if data and name.split("/")[-1] not in kind.spares]
    while n > 0:
        name = rng.choice(names)
        if rng.random() < 0.05:
            n -= 1
            yield f"{name}: gone", name, None
            continue
        how, data = rng.choice(WAYS)(kind.sound[name], rng)
        if data != kind.sound[name]:
            n -= 1
            yield f"{name}: {how}", name, data


@contextlib.contextmanager
def heard(into: list[str]) -> Iterator[None]:
    """Everything that is printed meanwhile, also by libraries that do not know Python's streams."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    out, err = sys.stdout, sys.stderr
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w", buffering=1)
        try:
            yield
        finally:
            sys.stdout.close()
            sys.stdout, sys.stderr = out, err
            for number, saved in zip((1, 2), before, strict=True):
                os.dup2(saved, number)
                os.close(saved)
            file.seek(0)
            into += [x for x in file.read().splitlines() if x.strip()]


def outcome(kind: Kind, want: object, case: str) -> Outcome:
    """What reading gives now, `want` being what it gives of the sound folder."""
    said: list[str] = []
    try:
        with heard(said):
            found = kind.read()
    except UserError as e:
        text = "\n".join([*said, str(e)])
        return Outcome("noise" if said or "\n" in str(e) else "refused", case, text)
    except Exception as e:
        return Outcome("traceback", case, f"{type(e).__name__}: {e}")
    if len(said) > 1:
        return Outcome("noise", case, "\n".join(said))
    if found == want:
        return Outcome("mended" if said else "same", case, "\n".join(said))
    return Outcome("silent", case, "\n".join(said))


def outcomes(kind: Kind, n: int, seed: int) -> Iterator[Outcome]:
    """`n` cases of damage, one after the other; the folder is sound before each and at the end."""
    want = kind.read()
    kind.restore()
    for case, name, data in cases(kind, n, seed):
        path = kind.folder / name
        try:
            path.unlink() if data is None else path.write_bytes(data)
            yield outcome(kind, want, case)
        finally:
            kind.restore()


def main() -> int:
    import kinds

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(kinds.MAKERS))
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file of the counts")
    parser.add_argument("--show", type=int, default=0, help="how many bad cases to print")
    args = parser.parse_args()
    bad, every = 0, dict[str, dict[str, int]]()
    with tempfile.TemporaryDirectory() as place:
        for name in args.kinds or kinds.MAKERS:
            folder = Path(place) / name
            folder.mkdir()
            found = list(outcomes(kinds.MAKERS[name](folder), args.n, args.seed))
            counts = collections.Counter(o.what for o in found)
            every[name] = dict(counts)
            print(f"{name}: {', '.join(f'{counts[w]} {w}' for w in (*GOOD, *BAD) if counts[w])}", flush=True)
            wrong = [o for o in found if o.what in BAD]
            bad += len(wrong)
            for o in wrong[: args.show]:
                print(f"  {o.what}: {o.case}: {o.said[:300]}", flush=True)
    if args.out:
        write_json(args.out, every)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
