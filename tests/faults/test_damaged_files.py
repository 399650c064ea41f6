"""Damaged files are told in one line or change nothing that is read (`injector`, `kinds`)."""

from __future__ import annotations

import collections
from pathlib import Path

import injector
import kinds
import pytest

from lm.errors import UserError

FEW = {"run": 24, "training": 12}  # others take a hundredth of the time


def check(kind: str, folder: Path, n: int, seed: int) -> collections.Counter[str]:
    found = list(injector.outcomes(kinds.MAKERS[kind](folder), n, seed))
    assert [f"{o.what}: {o.case}: {o.said}" for o in found if o.what in injector.BAD] == []
    return collections.Counter(o.what for o in found)


@pytest.mark.parametrize("kind", kinds.MAKERS)
def test_damage_is_told_or_harmless(kind: str, tmp_path: Path) -> None:
    """Most of it is told: what is damaged is used."""
    counts = check(kind, tmp_path, FEW.get(kind, 100), seed=1)
    assert counts["refused"] + counts["mended"] > 0.2 * counts.total()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", kinds.MAKERS)
def test_much_damage_is_told_or_harmless(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path, 1500, seed=2)


def _raise(text: str) -> None:
    raise UserError(text)


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda: 1, "same"),
        (lambda: 2, "silent"),
        (lambda: print("note: damaged") or 1, "mended"),
        (lambda: print("a\nb") or 1, "noise"),
        (lambda: [][0], "traceback"),
        (lambda: _raise("damaged"), "refused"),
        (lambda: print("more") or _raise("damaged"), "noise"),
    ],
    ids=["same", "silent", "mended", "noise", "traceback", "refused", "refused with noise"],
)
def test_what_the_injector_calls_it(read: object, what: str, tmp_path: Path) -> None:
    assert injector.outcome(injector.Kind(tmp_path, read), 1, "a case").what == what  # type: ignore[arg-type]
