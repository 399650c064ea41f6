"""Batches from other threads, going on from a saved place, mixtures, and what the loader refuses."""

from __future__ import annotations

import collections
import json
import threading
from typing import Any

import numpy as np
import pytest

from lm.data.corpus import Corpus
from lm.data.loader import Loader
from lm.data.packing import Packed
from lm.errors import UserError

T = 4


def source(n: int, start: int = 0) -> Packed:
    """`n` rows; row i begins with token ``start + i``, the same for all its tokens."""
    row = np.repeat(np.arange(start, start + n + 1), T)[: n * T + 1]
    offsets = np.array([0, len(row)])
    return Packed(Corpus(row, offsets, offsets[1:], ("d",), f"{n} {start}"), T)


def rows(batch: dict[str, np.ndarray]) -> list[int]:
    return [int(x) for x in batch["inputs"][:, 0]]


@pytest.mark.parametrize("weights", [None, [2.0, 1.0]])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_hold_neighbouring_rows_of_one_batch(weights: list[float] | None, processes: int) -> None:
    sources = [source(20), source(30, 1000)]
    whole = [rows(Loader(sources, weights, 4, 7).at(s)) for s in range(40)]
    parts = [Loader(sources, weights, 4, 7, p, processes) for p in range(processes)]
    assert [[r for part in parts for r in rows(part.at(s))] for s in range(40)] == whole
    assert all(part.at(3)["inputs"].shape == (4 // processes, T) for part in parts)


def test_an_epoch_that_is_no_multiple_of_the_batch_still_reads_every_row_once() -> None:
    loader = Loader([source(5), source(6, 1000)], None, 4, 1)
    assert loader.epoch_steps == 2 and loader.rows == 11
    drawn = [r for s in range(22) for r in rows(loader.at(s))]
    epochs = [drawn[i : i + 11] for i in range(0, 88, 11)]
    assert all(sorted(e) == [0, 1, 2, 3, 4, *range(1000, 1006)] for e in epochs)
    assert len({tuple(e) for e in epochs}) == len(epochs)


def test_mixtures_stay_within_binomial_bounds_everywhere() -> None:
    """Not only in all: any stretch of the run has nearly the proportions asked for."""
    loader = Loader([source(50), source(10, 1000), source(20, 2000)], [0.5, 0.2, 0.3], 8, 0)
    drawn = [r for s in range(75) for r in rows(loader.at(s))]
    for first in range(0, 600, 200):
        counts = collections.Counter(r // 1000 for r in drawn[first : first + 200])
        for i, share in enumerate((0.5, 0.2, 0.3)):
            assert abs(counts[i] - 200 * share) < 4 * (200 * share * (1 - share)) ** 0.5
    every = [r for r in drawn if 1000 <= r < 2000]
    epochs = [every[i : i + 10] for i in range(0, len(every) - 9, 10)]
    assert all(sorted(e) == list(range(1000, 1010)) for e in epochs) and len({tuple(e) for e in epochs}) > 1


def test_going_on_from_a_saved_place() -> None:
    loader = Loader([source(20)], None, 4, 0)
    batches = loader.iterate()
    for _ in range(3):
        next(batches)
    saved = json.loads(json.dumps(batches.get_state()))
    expected = [rows(next(batches)) for _ in range(5)]
    batches.set_state(saved)  # back, in the same iterator
    assert [rows(next(batches)) for _ in range(5)] == expected == [rows(loader.at(s)) for s in range(3, 8)]
    batches.close()
    other = Loader([source(20)], None, 4, 0).iterate(threads=2, ahead=3)  # forth, in a fresh one
    other.set_state(saved)
    assert [rows(next(other)) for _ in range(5)] == expected and other.get_state()["step"] == 8
    other.close()
    foreign = Loader([source(20)], None, 4, 1).iterate()
    with pytest.raises(UserError, match=r"train\.data: the saved place is in another order of rows"):
        foreign.set_state(saved)
    assert foreign.get_state()["step"] == 0  # and it goes on as if not asked
    assert rows(next(foreign)) == rows(Loader([source(20)], None, 4, 1).at(0))
    foreign.close()


def test_batches_are_made_in_other_threads_and_only_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, bool]] = []
    at = Loader.at

    def noted(self: Loader, step: int) -> dict[str, np.ndarray]:
        made.append((step, threading.current_thread() is threading.main_thread()))
        return at(self, step)

    monkeypatch.setattr(Loader, "at", noted)
    loader = Loader([source(20)], None, 4, 0)
    batches = loader.iterate(10**12, ahead=3)
    next(batches)
    batches.close()
    assert not any(main for _, main in made)
    steps = {step for step, _ in made}
    assert 10**12 in steps and steps <= set(range(10**12, 10**12 + 5))  # nothing before, and no more than was ahead
    batches.close()  # once more does no harm
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_an_error_in_a_thread_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Packed, i: int) -> Any:
        raise UserError("the disk is gone")

    monkeypatch.setattr(Packed, "__getitem__", broken)
    batches = Loader([source(20)], None, 4, 0).iterate()
    with pytest.raises(UserError, match="the disk is gone"):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "train.data.weights: 1 weights for 2 texts"),
        ([1.0, 1.0, 1.0], "train.data.weights: 3 weights for 2 texts"),
        ([1.0, -0.5], "train.data.weights: found (1.0, -0.5); valid: numbers from 0 on, not all 0"),
        ([0.0, 0.0], "train.data.weights: found (0.0, 0.0)"),
        ([1.0, float("nan")], "train.data.weights: found (1.0, nan)"),
        ([1.0, float("inf")], "train.data.weights: found (1.0, inf)"),
        ([0.0, 1.0], "train.batch: 8 rows asked for, the text makes 3"),
    ],
)
def test_weights_that_cannot_be(weights: list[float], words: str) -> None:
    with pytest.raises(UserError) as e:
        Loader([source(20), source(3, 1000)], weights, 8, 0)
    assert words in str(e.value)
