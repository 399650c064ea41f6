"""Searches: points that Optuna proposes one after the other, by how the earlier ones ended.

A search is a function ``search_NAME(trial)`` in a config file that returns a dict from dotted keys to values, like a
point of a sweep, with values from the trial's ``suggest_…`` methods::

    def search_rate(trial):
        return {"arms.sgd.train.optimizer.learning_rate": trial.suggest_float("rate", 0.1, 10.0, log=True)}

The study is kept in a file of its own, ``DIR/study.log``, or in any storage of Optuna's (``--storage=URL``). Its name
has the hash of the config's settings, the overrides, the arms and the objective: another question is another study. A
trial knows its point, so that the same command again first ends the trials that were interrupted, then tries once more
those that failed, and asks for new ones up to ``--trials``. Every trial draws with a seed made of ``--search-seed`` and
its number: with one point at a time, an interrupted search proposes what an unbroken one would have.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.running.cache import key
from experiments.sweeps import shared as sweeps
from experiments.sweeps.local import say
from experiments.sweeps.points import Point, State, literal, look, results_of
from experiments.sweeps.shared import Shared
from lm.errors import UserError, shown, unknown

# With several points at a time, `constant_liar` keeps TPE from proposing what is at work already.
SAMPLERS: dict[str, Callable[[Any, int], Any]] = {
    "tpe": lambda samplers, seed: samplers.TPESampler(seed=seed, constant_liar=True),
    "random": lambda samplers, seed: samplers.RandomSampler(seed=seed),
    "qmc": lambda samplers, seed: samplers.QMCSampler(seed=seed),
}
CHANGES, FOLDER, AGAIN = "changes", "folder", "again"  # what a trial knows: its point, and whose point it repeats


@dataclass(frozen=True)
class Objective:
    """The mean of a metric of one arm."""

    arm: str
    metric: str
    direction: str  # minimize or maximize, as Optuna spells it

    def __str__(self) -> str:
        return f"{self.direction} {self.arm}:{self.metric}"

    @staticmethod
    def parse(minimise: str | None, maximise: str | None) -> Objective:
        """From ``ARM:METRIC``; raises `UserError` unless there is exactly one."""
        if (minimise is None) == (maximise is None):
            found = "missing" if minimise is None else "given beside --maximise"
            raise UserError(f"--minimise: {found}; valid: one of --minimise=ARM:METRIC and --maximise=ARM:METRIC")
        flag, text = ("--minimise", minimise) if minimise is not None else ("--maximise", maximise)
        arm, colon, metric = (text or "").partition(":")
        if not (arm and colon and "/" in metric):
            raise UserError(f"{flag}: found {shown(text)}; valid: ARM:METRIC, for example adamw:training/nll")
        return Objective(arm, metric, "minimize" if minimise is not None else "maximize")

    def check(self, shared: Shared) -> None:
        """Raises `UserError` for an arm that is not run, or a measure that it does not have."""
        plan = shared.base()
        if self.arm not in plan.chosen:
            raise unknown("the objective's arm", self.arm, plan.chosen)
        label = self.metric.rpartition("/")[0]
        if label not in plan.arms[self.arm].measures:
            raise unknown(f"the objective's measure of arm {self.arm}", label, plan.arms[self.arm].measures)

    def value(self, point: Point) -> float | None:
        """Of a finished point; None where it is not finite. Raises `UserError` when there is no such metric."""
        metrics = (results_of(point) or {}).get("arms", {}).get(self.arm, {})
        if self.metric not in metrics:
            raise unknown(f"the objective's metric of arm {self.arm}", self.metric, metrics)
        found = metrics[self.metric]
        mean = found.get("mean") if isinstance(found, Mapping) else found
        return float(mean) if mean is not None and math.isfinite(mean) else None


class Search:
    """The feed of an engine: asks the study for points, and tells it their values."""

    def __init__(
        self, name: str, space: Callable[[Any], Any], shared: Shared, objective: Objective, sampler: str, seed: int
    ) -> None:
        """Checks everything that can be checked without the study; raises `UserError`, also for a mistake in the first
        point of the space. `example` is that point."""
        self.optuna = load()
        if sampler not in SAMPLERS:
            raise unknown("--search: optuna", sampler, SAMPLERS)
        self.name, self.space, self.shared, self.objective = name, space, shared, objective
        self.sampler, self.seed, self.total, self.asked = SAMPLERS[sampler], seed, 0, 0
        objective.check(shared)
        self.draft = self.optuna.create_study(sampler=self._fresh(0)).ask()
        self.example = self._propose(self.draft)
        self.open: dict[Path, list[int]] = {}  # folders of points at work -> their trials
        self.left: list[tuple[int, Point]] = []  # trials that earlier commands have not ended
        self.study: Any = None

    def begin(self, storage: str | None, trials: int) -> None:
        """Opens the study, or makes it, and looks at what earlier commands have left; raises `UserError` for a storage
        that cannot be opened."""
        self.total = trials
        self.study = study(self.optuna, storage or self.shared.workdir / "study.log", self.title(), self.objective)
        every = self._trials()
        good = [t for t in every if t.state.name != "FAIL"]
        for trial in (t for t in good if not t.state.is_finished()):
            point = self._point(trial)
            if look(point).name == "running":
                say(point, self.total, look(point).detail)
            else:
                self.left.append((trial.number, point))
        self.asked = len(good)
        seen = {t.user_attrs[FOLDER] for t in good}
        seen |= {t.user_attrs.get(AGAIN) for t in self.study.get_trials(deepcopy=False) if t.state.name == "WAITING"}
        for trial in every:
            if trial.user_attrs[FOLDER] not in seen:
                seen.add(trial.user_attrs[FOLDER])
                self.study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.user_attrs[FOLDER]})

    def title(self) -> str:
        """The study's name: readable, and another one for another question."""
        asked = {
            "config": self.shared.base().exp.to_dict(),
            "file": self.shared.source.place,
            "arms": self.shared.arms,
            "objective": str(self.objective),
        }
        return f"{self.shared.source.path.stem}-{self.name}-{key(asked)[:8]}"

    def next(self) -> Point | None:
        while self.left or self.asked < self.total:
            if self.left:
                number, point = self.left.pop(0)
            else:
                self.asked += 1
                number, point = self._ask()
            if point.folder in self.open:  # proposed again while it is at work
                self.open[point.folder].append(number)
                continue
            self.open[point.folder] = [number]
            if look(point).name != "done":
                point.begin()
                return point
            say(point, self.total, "done already")
            self.ended(point, look(point))
        return None

    def ended(self, point: Point, state: State) -> None:
        """Tells the study; an interrupted trial stays open there."""
        numbers = self.open.pop(point.folder, [])
        if state.name not in ("done", "failed"):
            return
        value = self.objective.value(point) if state.name == "done" else None
        for number in numbers:
            self.study.tell(number, value, None if value is not None else self.optuna.trial.TrialState.FAIL)

    def points(self) -> list[Point]:
        """All points of the study, each once, in the order of their first trials."""
        return list({p.folder: p for p in map(self._point, reversed(self._trials()))}.values())[::-1]

    def found(self) -> dict[str, Any]:
        """What the study says, JSON-ready: its trials, and the best one, None before there is one."""
        every = [
            {"trial": t.number + 1, "folder": t.user_attrs[FOLDER], "state": t.state.name.lower(), "value": t.value}
            for t in self._trials()
        ]
        done = [t for t in every if t["value"] is not None]
        best = (min if self.objective.direction == "minimize" else max)(done, key=lambda t: t["value"], default=None)
        return {"study": self.study.study_name, "objective": str(self.objective), "trials": every, "best": best}

    def _fresh(self, number: int) -> Any:
        """A sampler for one trial: what it draws depends on the trials so far, and on no process's past."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            return self.sampler(self.optuna.samplers, int(key({"seed": self.seed, "trial": number})[:8], 16))

    def _ask(self) -> tuple[int, Point]:
        self.study.sampler = self._fresh(len(self.study.get_trials(deepcopy=False)))
        trial = self.study.ask()
        try:
            point = self._propose(trial)
        except BaseException:
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
            raise
        trial.set_user_attr(CHANGES, {k: literal(v, k) for k, v in point.changes.items()})
        trial.set_user_attr(FOLDER, point.folder.name)  # last: what has it is whole
        return trial.number, point

    def _propose(self, trial: Any) -> Point:
        place = f"search {self.name}: trial {trial.number + 1}"
        try:
            changes = self.space(trial)
        except UserError as e:
            raise UserError(f"{place}: {e}") from None
        except Exception as e:
            text = " ".join(str(e).split())
            raise UserError(f"{place}: search_{self.name}() failed: {type(e).__name__}: {text}") from e
        return self.shared.point(place, trial.number + 1, sweeps.readable(place, changes))[0]

    def _point(self, trial: Any) -> Point:
        changes = {k: ast.literal_eval(v) for k, v in trial.user_attrs[CHANGES].items()}
        return self.shared.point(f"search {self.name}: trial {trial.number + 1}", trial.number + 1, changes)[0]

    def _trials(self) -> list[Any]:
        """Those that have got as far as to have a point."""
        return [t for t in self.study.get_trials(deepcopy=False) if FOLDER in t.user_attrs]


def load() -> Any:
    """Optuna, silent; raises `UserError` where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("--search: optuna is not installed; valid: pip install 'decoder-lab[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def study(optuna: Any, where: str | Path, name: str, objective: Objective) -> Any:
    """The study `name` in a storage's URL or a journal file; made when absent. Raises `UserError`."""
    try:
        if "://" in str(where):
            storage = optuna.storages.RDBStorage(str(where))
        else:
            Path(where).parent.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(where)))
        return optuna.create_study(storage=storage, study_name=name, direction=objective.direction, load_if_exists=True)
    except Exception as e:  # drivers of databases raise what they like
        lines = [x for x in str(e).splitlines() if x.strip()]
        valid = "valid: a file, or a URL of Optuna's such as sqlite:///search.db"
        raise UserError(
            f"--storage: {where} cannot be opened ({lines[0] if lines else type(e).__name__}); {valid}"
        ) from e
