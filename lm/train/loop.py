"""The training loop: resumes by itself, saves in the background, and says what it does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.config import ModelConfig, to_dict
from lm.data.loader import held_out_batches
from lm.errors import Terminated, TrainingStopped, UserError
from lm.interop import reader, run_folder, to_huggingface
from lm.model import params, reports
from lm.optimizers.base import n_bytes
from lm.sharding import processes
from lm.train import flops
from lm.train.checkpoint import Checkpoints
from lm.train.config import TrainConfig
from lm.train.data import Data
from lm.train.log import KINDS, Ledger, Log, NoLog, read
from lm.train.placement import Placement
from lm.train.step import Beside, draws, initial, transformation

__all__ = ["KINDS", "Trained", "run", "steps_done"]

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Trained:
    """`params` after the last step, `skipped` non-finite steps, and the run's folder."""

    params: Any
    skipped: int
    folder: Path


def run(
    cfg: ModelConfig,
    train: TrainConfig,
    data: Data,
    folder: Path,
    *,
    seed: int = 0,
    start: Any = None,
    start_identity: str = "random",
    start_source: str = "",
    report: Report = lambda fraction, text: None,
    tell: Callable[[str], None] = print,
) -> Trained:
    """Trains `cfg` in `folder`, going on from its newest sound checkpoint.

    `start`: initial parameters (a pretrained checkpoint's), None = random ones of `seed`; `start_source` is where they
    came from (a path or a name), for the folder of a run that adds to them. `report(fraction, text)` is
    called every step, `tell` for what a user should know. Raises `UserError` when the folder belongs to another run, is
    in use or cannot be written; `TrainingStopped` when training cannot go on; `Terminated` after SIGTERM.
    """
    about = {
        "model": to_dict(cfg),
        "train": train.determines(),
        "data": data.identity,
        "seed": seed,
        "start": start_identity,
    }
    about = json.loads(json.dumps(about))
    train.check(cfg)
    # One process writes the log; checkpoints are written by all.
    with _alone(folder) if jax.process_index() == 0 else contextlib.nullcontext():
        this = _Run(cfg, train, data, folder, about, seed, start_source, report, tell)
        try:
            with processes.watched():
                return this.all(start)
        finally:
            if jax.process_count() == 1 or isinstance(sys.exception(), (type(None), Terminated)):
                this.checkpoints.close()  # waits for what is being written, unless others would have to finish it


def steps_done(folder: Path) -> int:
    """Steps of the newest complete checkpoint in `folder`; opens nothing."""
    kept = (folder / "checkpoints").iterdir() if (folder / "checkpoints").is_dir() else ()
    return max((int(p.name) for p in kept if p.name.isdigit()), default=0)


class _Run:
    def __init__(
        self,
        cfg: ModelConfig,
        train: TrainConfig,
        data: Data,
        folder: Path,
        about: dict[str, Any],
        seed: int,
        source: str,
        report: Report,
        tell: Callable[[str], None],
    ) -> None:
        self.cfg, self.train, self.data, self.folder = cfg, train, data, folder
        self.about, self.seed, self.source, self.report, self.tell = about, seed, source, report, tell
        self.base: Any = None  # what trained parameters are added to, where they are
        self.ledger = Ledger()
        self.placement = Placement(cfg, train)
        self.loader = data.loader(train, seed, self.placement.share())
        self.checkpoints = Checkpoints(folder / "checkpoints", train.keep_last, train.keep_every)
        self.schedule = train.schedule.factor(train.steps)
        self.per_token = flops.per_token(cfg, train.data.seq_len, frozen=train.surgery.adds)
        self.evaluate_fn = self.placement.evaluator()
        self.clock = 0.0
        self.newest: tuple[int, Any] = (0, None)  # steps done, and the state after them

    def all(self, start: Any) -> Trained:
        train, ledger = self.train, self.ledger
        with ledger.during("init"):
            state, done = self._state(start)
            if done == train.steps and (self.data.held_out is None or processes.shared(self._evaluated())):
                return self._trained(state)
            self.peak, source = flops.peak(self.cfg.dtype)
            writes = jax.process_index() == 0
            self.log = Log(self.folder, done - 1 if done else None, train.tensorboard) if writes else NoLog()
            if writes:
                self._describe(state, source)
        if done < train.steps:
            with ledger.during("compile"):
                first = self.placement.batch(self.loader.at(done))
                step = self.placement.compile(state, first, self.beside)
            state = self._steps(step, state, done)
        if self.data.held_out is not None:
            with ledger.during("eval"):
                self._evaluate(state["params"], train.steps, train.final_rows, "final")
        self._finish()
        return self._trained(state)

    @property
    def beside(self) -> Beside:
        return Beside(self.base)

    def _trained(self, state: Any) -> Trained:
        whole = jax.jit(lambda base, trained: self.train.surgery.merge(self.cfg, base, trained))
        params = whole(self.base, state["params"]) if self.train.surgery.adds else state["params"]
        return Trained(params, int(state["skipped"]), self.folder)

    def _evaluated(self) -> bool:
        return any("final_nll" in line for line in read(self.folder / "metrics.jsonl"))

    def _state(self, start: Any) -> tuple[Any, int]:
        """The newest checkpoint's state and step, or the initial ones."""

        surgery, rng = self.train.surgery, jax.random.key(self.seed)
        if jax.process_count() > 1 and all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(start)):
            start = jax.device_get(start)  # what every process has read by itself goes anywhere as host arrays
        if surgery.adds:
            start = params.init(self.cfg, rng) if start is None else start
            self.base = start = jax.device_put(start, self.placement.shardings(start))

        def fresh(start: Any) -> Any:
            whole = params.init(self.cfg, rng) if start is None else start
            seed = self.seed if draws(self.cfg, self.train) else None
            return initial(self.cfg, self.train, surgery.init(self.cfg, whole, rng), seed)

        where = self.placement.shardings(jax.eval_shape(fresh, start))
        like = jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), jax.eval_shape(fresh, start), where
        )
        found = self.checkpoints.newest(like, self._check, self.tell)
        if found is not None:
            if found[0] < self.train.steps:
                self.tell(f"going on from step {found[0]} of {self.folder}")
            return found[1], found[0]
        return jax.jit(fresh, out_shardings=where)(start), 0

    def _check(self, about: dict[str, Any]) -> None:
        """Refuses a checkpoint of another run, naming what differs."""
        for key, ours in self.about.items():
            if about.get(key) != ours:
                place, old, new = _difference(about.get(key), ours, key)
                raise UserError(
                    f"{self.folder}: holds a training run with another {place}: {old!r} there, {new!r} here; "
                    "valid: the same settings, or another folder"
                )

    def _describe(self, state: Any, source: str) -> None:
        """``parameters.txt`` and ``run.json``, once."""
        tree = state["params"]
        named, axes = params.names(tree), params.described(params.axes(self.cfg), tree)
        width = max(len(n) for n in named)
        rows = [f"{n:{width}}  {leaf.shape!s:22} {leaf.dtype!s:9} {axes[n]}" for n, leaf in named.items()]
        n = params.count(tree)
        beside = f" trained, beside {params.count(self.base):,} that stay" if self.base is not None else ""
        size = n_bytes(transformation(self.cfg, self.train), tree)
        rows.append(
            f"{n:,} parameters{beside}; optimizer state {size / 2**20:,.2f} MiB, {size / n:.3f} bytes per parameter"
        )
        _write(self.folder / "parameters.txt", "\n".join(rows) + "\n")
        to_huggingface.save_tokenizer(self.folder, self.data.tokenizer)
        about = {
            **self.about,
            "start_source": self.source,
            "start_content": reader(self.source).identity() if self.source and self.train.surgery.adds else "",
            "tokenizer": run_folder.describe_tokenizer(self.data.tokenizer),
            "peak": source,
            "flops_per_token": self.per_token,
            "optimizer_bytes": size,
        }
        _write(self.folder / "run.json", json.dumps(about, indent=1) + "\n")

    def _steps(self, step: Any, state: Any, done: int) -> Any:
        train, ledger, total = self.train, self.ledger, self.train.steps
        batches = self.loader.iterate(done)
        if done == 0 and train.eval_every and self.data.held_out is not None:
            with ledger.during("eval"):
                self._evaluate(state["params"], 0, train.eval_rows, "held_out")
        self.clock, waiting = time.perf_counter(), None
        self.newest = (done, state)
        with _terminations() as asked, contextlib.closing(batches):
            for i in range(done, total):
                self._profile(i)
                with ledger.during("data"):
                    batch = self.placement.batch(next(batches))
                with ledger.during("step"):
                    state, metrics = step(state, batch, self.beside)
                    self.newest = (i + 1, state)  # the one before has been donated
                    if waiting is not None:
                        self._read(*waiting)  # of the step before, while this one runs
                    waiting = (i, metrics)
                    stops = asked()
                    last = i + 1 == total or stops
                    if (
                        last
                        or (i + 1) % train.save_every == 0
                        or (train.eval_every and (i + 1) % train.eval_every == 0)
                    ):
                        self._read(*waiting)
                        waiting = None
                if train.eval_every and (i + 1) % train.eval_every == 0 and i + 1 < total:
                    if self.data.held_out is not None:
                        with ledger.during("eval"):
                            self._evaluate(state["params"], i + 1, train.eval_rows, "held_out")
                    self.clock = time.perf_counter()
                if last or (i + 1) % train.save_every == 0:
                    with ledger.during("save"):
                        self.checkpoints.save(i + 1, state, self.about)
                    self.clock = time.perf_counter()
                if stops and i + 1 < total:
                    self._finish()
                    raise Terminated(f"step {i + 1} of {total} saved in {self.folder}; the same command goes on")
        return state

    def _read(self, i: int, metrics: Any) -> None:
        """Waits for the metrics of step `i`, logs them, and stops a run that does not recover."""
        found = jax.device_get(metrics)
        own = reports.report(self.cfg, found.pop("aux", ((),) * self.cfg.n_layers))
        m = {k: float(v) for k, v in found.items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        weight = max(m["weight"], 1.0)
        nll = m["nll"] / weight
        speed = weight / seconds
        line = {
            "loss": m["loss"],
            "nll": nll,
            "bits_per_byte": nll / math.log(2) / self.data.bytes_per_token,
            "accuracy": m["correct"] / weight if "correct" in m else None,
            **{k: v / weight for k, v in m.items() if k.startswith("aux_")},
            "grad_norm": m["grad_norm"],
            "learning_rate": self.train.optimizer.learning_rate * float(self.schedule(i)),
            "tokens": weight,
            "seconds": round(seconds, 5),
            "tokens_per_second": round(speed, 1),
            "mfu": round(speed * self.per_token / self.peak, 4),
            "skipped": int(m["skipped"]),
            **own,
        }
        if i % self.train.log_every == 0 or i + 1 == self.train.steps or not m["ok"]:
            self.log.write(i, **{k: _plain(v) for k, v in line.items()})
        text = (
            f"step {i + 1}/{self.train.steps}, loss {m['loss']:.3f}, {line['bits_per_byte']:.3f} bits/byte, "
            f"{speed:,.0f} tokens/s, MFU {line['mfu']:.0%}"
        )
        self.report((i + 1) / self.train.steps, text)
        if not m["ok"]:
            self.tell(
                f"step {i + 1}: loss {m['loss']:g}, gradient norm {m['grad_norm']:g}: not finite, skipped "
                f"({int(m['skipped'])} so far)"
            )
        if m["run"] >= self.train.max_skipped:
            with self.ledger.during("save"):
                good = i + 1 - int(m["run"])
                if not self.checkpoints.steps or self.checkpoints.steps[-1] < good:
                    # Skipped steps change no parameter; at most one step has been computed since.
                    self.checkpoints.save(*self.newest, self.about)
                self._finish()
            raise TrainingStopped(
                f"{self.folder}: {int(m['run'])} steps in a row were not finite (train.max_skipped = "
                f"{self.train.max_skipped}), the last good one was step {good}; the state after it is kept. Lower "
                "train.optimizer.learning_rate or train.clip"
            )

    def _evaluate(self, weights: Any, step: int, rows: int, name: str) -> None:
        """The objective on held-out rows, logged as ``NAME_…``."""
        assert self.data.held_out is not None
        sums: dict[str, Any] = {}
        for batch in held_out_batches(self.data.held_out, self.train.batch, rows):
            found = jax.tree.map(np.float64, jax.device_get(self.evaluate_fn(weights, batch, self.beside)))
            sums = jax.tree.map(np.add, sums, found) if sums else found
        own = reports.report(self.cfg, sums.pop("aux", ((),) * self.cfg.n_layers), whole=True)
        nll = sums["nll"] / max(sums["weight"], 1.0)
        bpb = nll / math.log(2) / self.data.bytes_per_token
        values = {"nll": float(nll), "bits_per_byte": float(bpb), "tokens": float(sums["weight"]), **own}
        if "correct" in sums:
            values["accuracy"] = float(sums["correct"] / max(sums["weight"], 1.0))
        # The step whose parameters these are is the one before.
        self.log.write(step - 1, **{f"{name}_{k}": _plain(v) for k, v in values.items()})

    def _profile(self, i: int) -> None:
        if self.train.profile:
            first, last = self.train.profile
            if i == first:
                jax.profiler.start_trace(str(self.folder / "profile"))
            if i == last + 1:
                jax.profiler.stop_trace()

    def _finish(self) -> None:
        """Waits for the disk, closes files, writes the ledger's entry for this session of the run."""
        with self.ledger.during("save"):
            self.checkpoints.wait()
        self.log.close()
        if jax.process_index() != 0:
            return
        path = self.folder / "goodput.json"
        sessions = json.loads(path.read_text()) if path.is_file() else []
        _write(path, json.dumps([*sessions, self.ledger.summary()], indent=1) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    swap = path.with_name(f".{path.name}.tmp")
    swap.write_text(text, encoding="utf-8")
    os.replace(swap, path)


def _difference(a: Any, b: Any, key: str) -> tuple[str, Any, Any]:
    """The first place where two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(n for n in b if n not in a)]:
            if a.get(name) != b.get(name):
                return _difference(a.get(name), b.get(name), f"{key}.{name}")
    return key, a, b


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system lets go when the process dies, however it dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e}); valid: another --workdir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder}: another process is training here; valid: wait for it, or another folder"
            ) from None
        yield


@contextlib.contextmanager
def _terminations() -> Iterator[Callable[[], bool]]:
    """Whether the run ends after a step: once SIGTERM has come, for as long as the context lasts (main thread only:
    others get no signals). Several processes agree on the step."""
    asked = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield processes.asked_to_stop if jax.process_count() > 1 else lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
