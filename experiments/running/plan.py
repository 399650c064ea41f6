"""A checked experiment as a list of jobs, and the folder its run is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.running.cache import write_json
from experiments.running.subject import Base
from experiments.spec import registry, settings
from experiments.spec.arms import RANDOM, Arm, Draft, base_model, check_shapes, choose, resolve, shapes
from experiments.spec.settings import MEASURES, Experiment
from lm.config import ModelConfig, to_dict
from lm.errors import UserError
from lm.plug import table


@dataclass(frozen=True)
class Plan:
    """`model`: the base model; `chosen`: the arms to run; `base` None: `absent` says why (dry runs and certificates
    only), and the model is that of the config's `architecture`, or a `Draft` where it names none."""

    exp: Experiment
    model: ModelConfig
    arms: dict[str, Arm]
    chosen: list[str]
    base: Base | None
    absent: str | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """One measurement; `seed` None where no seed can matter."""

    arm: str
    label: str
    seed: int | None
    plug: Any = field(repr=False)
    model: ModelConfig = field(repr=False)
    cost: float = 1.0
    trains: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm} / {self.label}" + ("" if not self.seed else f" / seed {self.seed}")

    def what(
        self, checkpoint: str, read: Mapping[Any, str], device: str, training: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Everything that determines the numbers; JSON-ready. The device is part of it: some measures are times.
        `training`: what determines the parameters, where they are trained."""
        measure = to_dict(self.plug, table(MEASURES))
        return {
            "checkpoint": checkpoint,
            "model": to_dict(self.model),
            "measure": measure,
            "reads": read[_text(measure)],
            "seed": self.seed,
            "device": device,
            **({} if training is None else {"training": dict(training)}),
        }


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def prepare(
    raw: Mapping[str, Any], overrides: Sequence[tuple[str, Any]], arms: str | None, absent_is_fine: bool = False
) -> Plan:
    """Checks settings, overrides and all arms; no weights are read. Raises `UserError` for the first mistake."""
    late = []  # which keys a model has depends on its checkpoint: these wait until it is known
    for dotted, value in overrides:
        if dotted.startswith("model."):
            late.append((dotted, value))
        else:
            raw = settings.override(raw, dotted, value)
    exp = settings.experiment(raw)
    base, absent = None, None
    try:
        base = Base(exp)
    except UserError as e:
        if not absent_is_fine:
            raise
        absent = str(e)
    stands = registry.architecture(exp.architecture) if exp.architecture else None
    own = base.config if base else stands
    if base is not None and own is not None and stands is not None and shapes(stands) != shapes(own):
        raise UserError(
            f"config.architecture: {exp.architecture!r} has other parameters than the checkpoint {exp.checkpoint!r}; "
            "valid: the checkpoint's own architecture, or none"
        )
    for dotted, value in late:
        raw = settings.override(raw, dotted, value, own or Draft())
    if late:
        exp = settings.experiment(raw)
    model = base_model(exp, own)
    found = resolve(exp, model)
    for arm in found.values():
        # A model trained from scratch is checked with the tokenizer of its training, one that nobody reads not at all.
        read = any(not getattr(m, "untrained", False) for m in arm.measures.values())
        if base is not None and not (base.random and (arm.train is not None or not read)):
            base.check(arm.model)
    if not isinstance(model, Draft) and exp.checkpoint != RANDOM:
        check_shapes(found, model)
    return Plan(exp, model, found, choose(found, arms), base, absent)


def make(plan: Plan) -> list[Job]:
    """All jobs of all arms, in the config's order. A seed that cannot matter is not repeated: the parameters are given
    and the measure draws nothing."""
    out = []
    for arm in plan.arms.values():
        for label, plug in arm.measures.items():
            alone = bool(getattr(plug, "untrained", False))
            trains = arm.train is not None and not alone
            drawn = trains or (plan.exp.checkpoint == RANDOM and not alone) or getattr(plug, "stochastic", True)
            cost = float(plug.cost(arm.model)) if hasattr(plug, "cost") else 1.0
            for seed in plan.exp.seeds if drawn else (None,):
                out.append(Job(arm.name, label, seed, plug, arm.model, cost, trains))
    return out


def identities(plan: Plan) -> dict[Any, str]:
    """What every measure will read, as a hash; a text that is missing or broken is refused here, before any work."""
    out: dict[Any, str] = {}
    for arm in plan.arms.values():
        for label, plug in arm.measures.items():
            at = _text(to_dict(plug, table(MEASURES)))
            if at not in out:
                try:
                    out[at] = str(plug.identity()) if hasattr(plug, "identity") else ""
                except UserError as e:
                    raise UserError(f"measures.{label}: {e}") from None
    return out


@dataclass(frozen=True)
class Workdir:
    """A run folder: new, empty, or of this very config."""

    path: Path
    place: str
    plan: Plan

    def check(self) -> None:
        """Raises `UserError` when the folder holds anything else than a run of this config."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir: {self.path} is a file; valid: a new folder, or the folder of this run")
        file = self.path / "config.json"
        if not file.exists():
            found = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            if found:
                raise UserError(
                    f"--workdir: {self.path} holds {found[0]!r} but no config.json; valid: a new or empty folder"
                )
            return
        theirs, ours = registry.read_json(file)[1], self.plan.exp.to_dict()
        if theirs != ours:
            key, old, new = _difference(theirs, ours, "config")
            raise UserError(
                f"--workdir: {self.path} holds another config: {key} is {_short(old)} there and {_short(new)} here; "
                "valid: another folder"
            )

    def start(self, environment: Mapping[str, Any]) -> None:
        """Makes the folder and writes config.json and environment.json."""
        plan = self.plan
        resolved = {
            name: {
                "model": to_dict(arm.model),
                "measures": {label: to_dict(m, table(MEASURES)) for label, m in arm.measures.items()},
                **({"train": to_dict(arm.train), "trained": to_dict(arm.trained)} if arm.train is not None else {}),
            }
            for name, arm in plan.arms.items()
        }
        data = {"schema": registry.SCHEMA, "file": self.place, "config": plan.exp.to_dict(), "resolved": resolved}
        write_json(self.path / "config.json", settings.plain(data, lists=True))
        write_json(self.path / "environment.json", dict(environment))


def _difference(a: Any, b: Any, key: str) -> tuple[str, Any, Any]:
    """The first place where two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(n for n in b if n not in a)]:
            if name not in a or name not in b or a[name] != b[name]:
                return _difference(a.get(name, "absent"), b.get(name, "absent"), f"{key}.{name}")
    return key, a, b


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
