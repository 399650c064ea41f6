"""Batches in an order that (seed, step) determines, whatever the number of processes, through Grain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from lm.data.packing import Packed, split_row
from lm.errors import UserError
from lm.plug import SEEDS

Batch = dict[str, np.ndarray]


class Loader:
    """Batch s of the run is elements ``[s B, (s + 1) B)`` of one endless sequence, of which process p of P takes the
    p-th part.

    The sequence: every source shuffled anew each epoch (Grain's index shuffle, random access), mixed by `weights`
    (None: one shuffle over the rows of all sources). Nothing but the step needs to be kept to go on.
    Raises `UserError` when there are fewer rows than a batch takes, when the batch does not divide by the processes,
    and for weights that are not one number from 0 on for every source, some above 0.
    """

    def __init__(
        self,
        sources: Sequence[Packed],
        weights: Sequence[float] | None,
        batch: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if batch % process_count:
            raise UserError(
                f"train.batch: {batch} rows are not divisible by {process_count} processes; "
                f"valid: a multiple of {process_count}"
            )
        if weights is not None:
            _check(weights, len(sources))
        rows = sum(len(s) for i, s in enumerate(sources) if weights is None or weights[i] > 0)
        if rows < batch:
            raise UserError(
                f"train.batch: {batch} rows asked for, the text makes {rows} of train.data.seq_len = "
                f"{sources[0].seq_len}; valid: a smaller batch, shorter rows or more text"
            )
        self.batch, self.rows = batch, rows
        n = batch // process_count
        self._mine = range(process_index * n, (process_index + 1) * n)
        self._elements = _endless(sources, weights, seed)
        about = [[s.identity for s in sources], list(weights or ()), batch, seed]
        self.identity = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]

    @property
    def epoch_steps(self) -> int:
        """Whole batches in as many rows as the sources have."""
        return self.rows // self.batch

    def at(self, step: int) -> Batch:
        """This process's rows of batch `step`: arrays ``[B / P, T]`` as `lm.data.packing.split_row` names them."""
        rows = [split_row(self._elements[step * self.batch + i]) for i in self._mine]
        return {k: np.stack([r[k] for r in rows]) for k in rows[0]}

    def iterate(self, start: int = 0, threads: int = 1, ahead: int = 4) -> Batches:
        """Batches from step `start` on, made `ahead` of time in `threads` threads of their own."""
        return Batches(self, start, threads, ahead)


class Batches:
    """An endless iterator over a loader's batches; the state is all it takes to go on elsewhere."""

    def __init__(self, loader: Loader, start: int, threads: int, ahead: int) -> None:
        self._loader = loader
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._go_to(start)

    def _go_to(self, step: int) -> None:
        steps = grain.MapDataset.range(step, 2**62).map(self._loader.at)
        self._inner = iter(steps.to_iter_dataset(self._options))
        self._step = step

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        out = next(self._inner)
        self._step += 1
        return out

    @property
    def state(self) -> dict[str, Any]:
        """JSON-ready: the next step, and what order it counts in."""
        return {"step": self._step, "order": self._loader.identity}

    def get_state(self) -> dict[str, Any]:
        """`state`, under the name that Grain's iterators have for it."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; `UserError` for the state of another order."""
        if state.get("order") != self._loader.identity:
            raise UserError(
                f"train.data: the saved place is in another order of rows ({state.get('order')}, here "
                f"{self._loader.identity}); valid: the texts, seq_len, packing, weights, batch and seed of that run"
            )
        self.close()
        self._go_to(int(state["step"]))

    def close(self) -> None:
        """Stops the threads."""
        self._inner.close()


def _check(weights: Sequence[float], n: int) -> None:
    if len(weights) != n:
        raise UserError(f"train.data.weights: {len(weights)} weights for {n} texts; valid: one each, or none")
    if not all(0 <= w < float("inf") for w in weights) or sum(weights) <= 0:
        raise UserError(f"train.data.weights: found {tuple(weights)}; valid: numbers from 0 on, not all 0")


def _endless(sources: Sequence[Packed], weights: Sequence[float] | None, seed: int) -> Any:
    if weights is None:
        return grain.MapDataset.source(_Rows(sources)).seed(seed).shuffle().repeat()
    shuffled = [
        grain.MapDataset.source(s).seed((seed + i) % SEEDS).shuffle().repeat()
        for i, s in enumerate(sources)
        if weights[i] > 0
    ]
    return grain.MapDataset.mix(shuffled, [w for w in weights if w > 0])


class _Rows:
    """The rows of several sources, one after the other."""

    def __init__(self, sources: Sequence[Packed]) -> None:
        self._sources = list(sources)
        self._ends = np.cumsum([len(s) for s in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Batch:
        k = int(np.searchsorted(self._ends, i, "right"))
        return self._sources[k][int(i - (self._ends[k - 1] if k else 0))]


def held_out_batches(packed: Packed, batch: int, limit: int) -> Iterator[Batch]:
    """The first `limit` rows in order, `batch` at a time; the last batch is filled up with rows of weight 0."""
    n = min(len(packed), limit)
    for first in range(0, n, batch):
        rows = [split_row(packed[i]) for i in range(first, min(first + batch, n))]
        out = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
        short = batch - len(rows)
        yield {k: np.pad(v, ((0, short), (0, 0)), constant_values=-(k == "index")) for k, v in out.items()}
