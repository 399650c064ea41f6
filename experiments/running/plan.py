"""A checked experiment with its arms, and the folder its run is kept in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.running.cache import claim_json, write_json
from experiments.running.subject import Base
from experiments.spec import registry, settings
from experiments.spec.arms import RANDOM, Arm, base_model, check_shapes, choose, resolve, shapes
from experiments.spec.settings import MEASURES, Experiment, Settings
from experiments.spec.surgery import written
from lm.config import ModelConfig, to_dict
from lm.errors import UserError
from lm.nested import difference
from lm.plug import table

FIRST = ("checkpoint", "adapter", "architecture")  # which keys a model has depends on these


@dataclass(frozen=True)
class Plan:
    """`model`: the base model, None where a checkpoint that is not at hand would say it; `chosen`: the arms to run;
    `base` None: `absent` says why (dry runs and certificates only)."""

    exp: Experiment
    model: ModelConfig | None
    arms: dict[str, Arm]
    chosen: list[str]
    base: Base | None
    absent: str | None = None


def prepare(
    raw: Settings, overrides: Sequence[tuple[str, Any]], arms: str | None, absent_is_fine: bool = False
) -> Plan:
    """Checks settings, overrides and all arms; no weights are read. Raises `UserError` for the first mistake, and what
    JAX does for a platform that is asked for and not there."""
    if jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.devices()
    for dotted, value in (o for o in overrides if o[0] in FIRST):
        raw = settings.override(raw, dotted, value)
    base, own, absent = _start(*settings.places(raw), absent_is_fine)
    for dotted, value in (o for o in overrides if o[0] not in FIRST):
        raw = settings.override(raw, dotted, value, own)
    exp = settings.experiment(raw)
    model, found = base_model(exp, own), resolve(exp, own)
    for arm in found.values():
        # A model trained from scratch is checked with the tokenizer of its training, one that nobody reads not at all.
        read = any(not m.untrained for m in arm.measures.values())
        if base is not None and not (base.random and (arm.train is not None or not read)):
            base.check(arm.config)
    if model is not None and exp.checkpoint != RANDOM:
        check_shapes(found, model)
    return Plan(exp, model, found, choose(found, arms), base, absent)


def _start(
    checkpoint: str, architecture: str, absent_is_fine: bool
) -> tuple[Base | None, ModelConfig | None, str | None]:
    """The checkpoint, its model (that of `architecture` where it is not at hand), and why it is not."""
    base, absent = None, None
    try:
        base = Base(checkpoint)
    except UserError as e:
        if not absent_is_fine:
            raise
        absent = str(e)
    stands = registry.architecture(architecture) if architecture else None
    own = base.config if base is not None else stands
    if base is not None and own is not None and stands is not None and shapes(stands) != shapes(own):
        raise UserError(
            f"config.architecture: {architecture!r} has other parameters than the checkpoint {checkpoint!r}; "
            "valid: the checkpoint's own architecture, or none"
        )
    return base, own, absent


def check_target(folder: Path, key: str) -> None:
    """Raises `UserError` unless the folder is one that can be written, or made."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise UserError(f"{key}: {folder} cannot be written ({there} is no folder); valid: a folder, or a new one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} cannot be written (permission denied at {there}); valid: another folder")


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
        check_target(self.path, "--workdir")
        file = self.path / "config.json"
        if not file.exists():
            names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            found = [name for name in names if not name.startswith(".config.json.")]  # another run that begins, or died
            if found:
                raise UserError(
                    f"--workdir: {self.path} holds {found[0]!r} but no config.json; valid: a new or empty folder"
                )
            return
        theirs, ours = registry.read_json(file)[1], self.plan.exp.to_dict()
        if theirs != ours:
            key, old, new = difference(theirs, ours, "config", _ABSENT)
            raise UserError(
                f"--workdir: {self.path} holds another config: {key} is {_short(old)} there and {_short(new)} here; "
                "valid: another folder"
            )

    def start(self, environment: Mapping[str, Any]) -> None:
        """Makes the folder and writes config.json and environment.json. Of runs that come at once, one gets a new
        folder; the others are refused as by `check`, unless they are of the same config."""
        plan = self.plan
        resolved = {
            name: {
                "model": to_dict(arm.model),
                "measures": {label: to_dict(m, table(MEASURES)) for label, m in arm.measures.items()},
                **({"train": to_dict(arm.train), "trained": to_dict(arm.trained)} if arm.train is not None else {}),
                **written(arm.surgery),
            }
            for name, arm in plan.arms.items()
        }
        data = {"schema": registry.SCHEMA, "file": self.place, "config": plan.exp.to_dict(), "resolved": resolved}
        file, plain = self.path / "config.json", settings.plain(data, lists=True)
        if not claim_json(file, plain):
            self.check()
            write_json(file, plain)
        write_json(self.path / "environment.json", dict(environment))


_ABSENT = object()  # equal to no setting, whatever a config holds


def _short(value: object) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
