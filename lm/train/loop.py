"""The training loop: resumes by itself, saves in the background, and says what it does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lm.config import ModelConfig
from lm.errors import Terminated, TrainingStopped, UserError
from lm.sharding import processes
from lm.train import flops
from lm.train.checkpoint import Checkpoints
from lm.train.config import TrainConfig
from lm.train.data import Data
from lm.train.describe import describe
from lm.train.evaluate import Evaluation
from lm.train.folder import CHECKPOINTS, METRICS, steps
from lm.train.log import Ledger, Log, NoLog, Tell, read
from lm.train.metrics import Meter, plain
from lm.train.placement import Placement
from lm.train.resume import begin
from lm.train.run import FrozenModel, Run, Start
from lm.train.session import alone, terminations
from lm.train.step import ALONE, State

__all__ = ["Start", "Trained", "run", "steps_done"]

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
    start: Start | None = None,
    models: Mapping[str, FrozenModel] | None = None,
    report: Report = lambda fraction, text: None,
    tell: Tell = print,
) -> Trained:
    """Trains `cfg` in `folder`, going on from its newest sound checkpoint.

    `start`: the parameters to start from, None = random ones of `seed`. `models`: the frozen ones that the objective
    asks for. `report(fraction, text)` is called every step,
    `tell` for what a user should know. Raises `UserError` when the folder belongs to another run, is in use or cannot
    be written; `TrainingStopped` when training cannot go on; `Terminated` after SIGTERM.
    """
    this = Run(cfg, train, data, folder, seed, Start() if start is None else start, models or {})
    train.check(cfg)
    train.samples.ids(cfg, data.text)
    # One process writes the log; checkpoints are written by all.
    with alone(folder) if jax.process_index() == 0 else contextlib.nullcontext():
        loop = Loop(this, report, tell)
        try:
            with processes.watched():
                return loop.all()
        finally:
            if jax.process_count() == 1 or isinstance(sys.exception(), (type(None), Terminated)):
                loop.checkpoints.close()  # waits for what is being written, unless others would have to finish it


def steps_done(folder: Path) -> int:
    """Steps of the newest complete checkpoint in `folder`; opens nothing."""
    return max(steps(folder), default=0)


class Loop:
    """One session of a run: from where the run stands to its end."""

    def __init__(self, run: Run, report: Report, tell: Tell) -> None:
        self.run, self.report, self.tell = run, report, tell
        self.ledger = Ledger()
        self.placement = Placement(run.cfg, run.train)
        self.loader = run.data.loader(run.train, run.seed, self.placement.share())
        self.checkpoints = Checkpoints(run.folder / CHECKPOINTS, run.train.keep_last, run.train.keep_every)
        self.evaluation = Evaluation(run, self.placement)
        self.log: Log | NoLog = NoLog()
        self.meter: Meter
        self.beside = ALONE
        self.newest: tuple[int, State]  # steps done, and the state after them

    def all(self) -> Trained:
        train, ledger = self.run.train, self.ledger
        with ledger.during("init"):
            state, done, self.beside = begin(self.run, self.placement, self.checkpoints, self.tell)
            if done == train.steps and (not self.evaluation.possible or processes.shared(self._evaluated())):
                return self._trained(state)
            self._open(state, done)
        if done < train.steps:
            with ledger.during("compile"):
                first = self.placement.batch(self.loader.at(done))
                self.placement.check(first)
                self.placement.compile(state, first, self.beside)
            state = self._steps(state, done)
        self._evaluate(state, train.steps, train.final_rows, "final")
        self._finish()
        return self._trained(state)

    def _evaluated(self) -> bool:
        """Whether the log ends with the final evaluation. A damaged one is told by whoever reads its numbers."""
        with contextlib.suppress(UserError):
            return any("final_nll" in line for line in read(self.run.folder / METRICS))
        return True

    def _about(self) -> dict[str, Any]:
        """What a checkpoint belongs to, and the last line of the log when it was saved."""
        return {**self.run.about, "log": self.log.mark}

    def _trained(self, state: State) -> Trained:
        return Trained(self._params(state), int(state["skipped"]), self.run.folder)

    def _params(self, state: State) -> Any:
        """The whole model's parameters, adapters merged."""
        surgery = self.run.train.surgery
        merge = jax.jit(lambda base, trained: surgery.merge(self.run.cfg, base, trained))
        return merge(self.beside.base, state["params"]) if surgery.adds else state["params"]

    def _open(self, state: State, done: int) -> None:
        """The log, and the files that say what the run is."""
        run = self.run
        per_token = flops.per_token(run.cfg, run.train.data.seq_len, frozen=run.train.surgery.adds)
        peak, source = flops.peak(run.cfg.dtype)
        self.meter = Meter(run, per_token, peak)
        if jax.process_index() == 0:
            after, mark = (done - 1, self.checkpoints.about.get("log")) if done else (None, None)
            self.log = Log(run.folder, after, run.train.trackers, run.about, self.tell, mark)
            describe(run, state["params"], self.beside.base, source, per_token)

    def _steps(self, state: State, done: int) -> State:
        train, ledger = self.run.train, self.ledger
        batches = self.loader.iterate(done)
        if done == 0 and train.eval_every:
            self._evaluate(state, 0, train.eval_rows, "held_out")
        self.meter.restart()
        self.newest, unread = (done, state), None
        with terminations() as asked, contextlib.closing(batches):
            for i in range(done, train.steps):
                self._profile(i)
                with ledger.during("data"):
                    batch = self.placement.batch(next(batches))
                with ledger.during("step"):
                    step = self.placement.compile(state, batch, self.beside)  # once for every shape of a batch
                    state, metrics = step(state, batch, self.beside)
                    self.newest = (i + 1, state)  # the one before has been donated
                    if unread is not None:
                        self._read(*unread)  # of the step before, while this one runs
                    unread = (i, metrics)
                    stops = asked()
                    evaluates, saves = self._due(i + 1, stops)
                    if evaluates or saves:
                        self._read(*unread)
                        unread = None
                self._between(state, i + 1, evaluates, saves)
                if stops and i + 1 < train.steps:
                    self._finish()
                    raise Terminated(
                        f"step {i + 1} of {train.steps} saved in {self.run.folder}; the same command goes on"
                    )
        return state

    def _due(self, done: int, stops: bool) -> tuple[bool, bool]:
        """Whether an evaluation and a checkpoint are due after `done` steps."""
        train = self.run.train
        evaluates = bool(train.eval_every) and done % train.eval_every == 0
        return evaluates, stops or done == train.steps or done % train.save_every == 0

    def _between(self, state: State, done: int, evaluates: bool, saves: bool) -> None:
        """Evaluates and saves; neither is part of the next step's time."""
        if evaluates and done < self.run.train.steps:  # the last evaluation is the final one
            self._evaluate(state, done, self.run.train.eval_rows, "held_out")
            self.meter.restart()
        if self.run.train.samples.due(done, self.run.train.steps):
            self._sample(state, done)
            self.meter.restart()
        if saves:
            with self.ledger.during("save"):
                self.checkpoints.save(done, state, self._about())
            self.meter.restart()

    def _read(self, i: int, metrics: Mapping[str, object]) -> None:
        """Waits for the metrics of step `i`, logs them, and stops a run that does not recover."""
        train = self.run.train
        line, text, m = self.meter.read(i, metrics)
        if i % train.log_every == 0 or i + 1 == train.steps or not m["ok"]:
            self.log.write(i, **{k: plain(v) for k, v in line.items()})
        self.report((i + 1) / train.steps, text)
        if not m["ok"]:
            self.tell(
                f"step {i + 1}: loss {m['loss']:g}, gradient norm {m['grad_norm']:g}: not finite, skipped "
                f"({int(m['skipped'])} so far)"
            )
        if m["run"] >= train.max_skipped:
            self._give_up(good=i + 1 - int(m["run"]), skipped=int(m["run"]))

    def _give_up(self, good: int, skipped: int) -> None:
        """Saves the state after step `good`, the last finite one, and raises `TrainingStopped`."""
        with self.ledger.during("save"):
            if not self.checkpoints.steps or self.checkpoints.steps[-1] < good:
                # Skipped steps change no parameter; at most one step has been computed since.
                self.checkpoints.save(*self.newest, self._about())
            self._finish()
        raise TrainingStopped(
            f"{self.run.folder}: {skipped} steps in a row were not finite (train.max_skipped = "
            f"{self.run.train.max_skipped}), the last good one was step {good}; the state after it is kept. Lower "
            "train.optimizer.learning_rate or train.clip"
        )

    def _evaluate(self, state: State, done: int, rows: int, name: str) -> None:
        """Logs the objective on held-out rows as ``NAME_…``, at the step whose parameters these are."""
        if self.evaluation.possible:
            with self.ledger.during("eval"):
                values = self.evaluation(state["params"], rows, self.beside)
                self.log.write(done - 1, **{f"{name}_{k}": plain(v) for k, v in values.items()})

    def _sample(self, state: State, done: int) -> None:
        """Logs what the model writes, at the step whose parameters these are."""
        run = self.run
        with self.ledger.during("eval"):
            for prompt, text, about in run.train.samples.written(run.cfg, self._params(state), run.data.text):
                self.log.sample(done - 1, prompt, text, **about)

    def _profile(self, i: int) -> None:
        if self.run.train.profile:
            first, last = self.run.train.profile
            if i == first:
                jax.profiler.start_trace(str(self.run.folder / "profile"))
            if i == last + 1:
                jax.profiler.stop_trace()

    def _finish(self) -> None:
        """Waits for the disk, closes files, writes the ledger's entry for this session of the run."""
        with self.ledger.during("save"):
            self.checkpoints.wait()
        self.log.close()
        if jax.process_index() == 0:
            self.ledger.write(self.run.folder)
