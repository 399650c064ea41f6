"""Arms: the base model with an arm's dotted overrides, and the measures the arm runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from experiments.spec.settings import (
    MEASURES,
    RANDOM,
    Experiment,
    Settings,
    change,
    change_measure,
    measure,
    names_first,
    parts,
)
from experiments.spec.surgery import surgeries
from lm.config import ModelConfig, build, checked, merge, overlay, to_dict
from lm.errors import UserError, nearest, shown, unknown
from lm.measures import Measure
from lm.model import params
from lm.plug import table
from lm.surgery.base import Surgery
from lm.train.config import TrainConfig

KEYS = ("only", "trains", "untrained", "starts_from", "surgery", "model", "train", "measures")
VALID = "only, trains, untrained, starts_from, surgery, model.KEY, train.KEY, measures.LABEL.KEY"


@dataclass(frozen=True)
class Arm:
    """`model`: None where it follows from a checkpoint that is not at hand. `measures`: label -> plug, only those that
    this arm runs. `train`: how its parameters are trained, and `trained` the model they are trained as, which `model`
    then reads; None for parameters that are not trained. `start`: the arm whose trained parameters that training starts
    from; None = the experiment's checkpoint. `surgery`: what is done to its parameters before they are measured."""

    name: str
    model: ModelConfig | None
    measures: dict[str, Measure]
    train: TrainConfig | None = None
    trained: ModelConfig | None = None
    start: Arm | None = None
    surgery: tuple[Surgery, ...] = ()

    @property
    def config(self) -> ModelConfig:
        """The model of an arm that can run."""
        assert self.model is not None, f"arms.{self.name}: no checkpoint says what its model is"
        return self.model


def settings_of(exp: Experiment, own: ModelConfig | None) -> Settings:
    """What every arm changes: the checkpoint's own model with the experiment's changes over it.

    Without a checkpoint these are the changes alone, over the defaults of `ModelConfig`, so that an arm that changes
    ``n_heads`` also changes the ``n_kv_heads`` that nobody set.
    """
    return overlay(ModelConfig, own, exp.model, "model")


def base_model(exp: Experiment, own: ModelConfig | None) -> ModelConfig | None:
    """The model every arm starts from, checked; None where it is that of a checkpoint which is not at hand."""
    settings = settings_of(exp, own)
    if own is None and exp.checkpoint != RANDOM:
        checked(ModelConfig, settings, "model")
        return None
    return _model(settings)


def _model(settings: Settings) -> ModelConfig:
    made = build(ModelConfig, settings, "model")
    assert isinstance(made, ModelConfig)
    return made


def resolve(exp: Experiment, own: ModelConfig | None) -> dict[str, Arm]:
    """Every arm, checked; `own` is the checkpoint's model, None where there is none at hand. Raises `UserError` that
    names the arm and the key."""
    base, out = settings_of(exp, own), {}
    # Where the checkpoint is not at hand, a config may still describe the whole model.
    known = own is not None or exp.checkpoint == RANDOM or "vocab_size" in exp.model
    for name, changes in exp.arms.items():
        try:
            out[name] = _arm(exp, base, known, name, changes)
        except UserError as e:
            raise UserError(f"arms.{name}: {e}") from None
    for name in out:
        out[name] = _started(exp, out, name, ())
    for name in out:
        frozen(out, name)
    return out


def frozen(arms: Mapping[str, Arm], name: str, before: tuple[str, ...] = ()) -> dict[str, Arm | str]:
    """The frozen models that an arm's training runs (`lm.train.config.TrainConfig.models`), by name: another arm, or a
    checkpoint. Raises `UserError` for arms that there are not, and for arms that wait for each other."""
    out: dict[str, Arm | str] = {}
    train = arms[name].train
    for role, place in ({} if train is None else train.models).items():
        kind, _, other = place.partition(":")
        if kind != "arm":
            out[role] = place
            continue
        at = f"arms.{name}: train.models.{role}"
        if other not in arms:
            raise unknown(at, other, arms)
        if other in (*before, name):
            raise UserError(f"{at}: arm {other!r} waits for this one; valid: an arm that is trained before it")
        frozen(arms, other, (*before, name))
        out[role] = arms[other]
    return out


def _started(exp: Experiment, arms: Mapping[str, Arm], name: str, before: tuple[str, ...]) -> Arm:
    """The arm with the arm it starts from, and that one's start, and so on."""
    arm, at = arms[name], f"arms.{name}.starts_from"
    start = exp.arms[name].get("starts_from")
    if start is None:
        return arm
    if not isinstance(start, str):
        raise UserError(f"{at}: found {shown(start)}; valid: the name of an arm")
    if start not in arms:
        raise unknown(at, start, arms)
    if start in (*before, name):
        raise UserError(f"{at}: {start!r} starts from this arm in turn; valid: an arm that does not")
    if arm.train is None or arms[start].train is None:
        raise UserError(f"{at}: found {shown(start)}, but one of the two is not trained; valid: two arms that are")
    found = _started(exp, arms, start, (*before, name))
    if arm.trained is not None and found.trained is not None and shapes(found.trained) != shapes(arm.trained):
        raise UserError(f"{at}: {start!r} has parameters of other shapes; valid: an arm with the same")
    return dataclasses.replace(arm, start=found)


@dataclass
class _Changes:
    """What an arm's dotted keys come to: settings of its model, of its training and of its measures."""

    model: Settings
    measures: dict[str, Any]
    chosen: list[str]
    train: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)  # trains, untrained
    starts: bool = False
    surgery: tuple[Surgery, ...] = ()

    def set(self, exp: Experiment, dotted: str, value: object) -> None:
        head, *rest = parts(dotted)
        if dotted == "only":
            self.chosen = _only(exp, value)
        elif head == "model" and rest:
            self.model = change(ModelConfig, self.model, rest, value, "model")
        elif head == "measures" and rest:
            self.measures[rest[0]] = change_measure(self.measures, rest, value)
        elif head == "train" and rest:
            training = exp.training()
            if training is None:
                raise UserError(f"{dotted}: nothing is trained; valid: set config.train, at least config.train.steps")
            self.train = change(TrainConfig, self.train, rest, value, "train", training)
        elif dotted in ("trains", "untrained"):
            if not isinstance(value, bool):
                raise UserError(f"{dotted}: expected True or False, found {shown(value)}")
            self.flags[dotted] = value
        elif dotted == "surgery":
            self.surgery = surgeries(value)
        elif dotted == "starts_from":
            self.starts = True
        else:
            raise UserError(f"{dotted}: unknown key{nearest(head, KEYS)}; valid: {VALID}")


def _arm(exp: Experiment, base: Settings, known: bool, name: str, changes: Mapping[str, Any]) -> Arm:
    to = _Changes(base, {label: to_dict(m, table(MEASURES)) for label, m in exp.measures.items()}, list(exp.measures))
    # A plug is named before its fields are set, in whatever order the keys come (ConfigDict sorts them).
    for dotted, value in names_first(changes):
        to.set(exp, dotted, value)
    model = None
    if known:
        model = _model(to.model)
        model.layers()  # refuses malformed layer overrides
    else:
        checked(ModelConfig, to.model, "model")
    plugs = {label: measure(label, to.measures[label]) for label in to.chosen}
    training, trains, untrained = exp.training(), to.flags.get("trains"), to.flags.get("untrained")
    if untrained and (to.train or trains or to.starts):
        raise UserError("untrained: goes with no key of training; valid: one of them")
    if training is None or untrained:
        return Arm(name, model, plugs, surgery=to.surgery)
    trained = _trained(base, model, bool(trains))
    return Arm(name, model, plugs, merge(training, to.train, "train"), trained, surgery=to.surgery)


def _trained(base: Settings, model: ModelConfig | None, trains: bool) -> ModelConfig | None:
    """The model that an arm's parameters are trained as: its own where it `trains` or has other parameters, else the
    base model, so that arms share the training."""
    if trains or model is None:
        return model
    common = _model(base)
    return model if shapes(model) != shapes(common) else common


def _only(exp: Experiment, value: object) -> list[str]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(label, str) for label in value):
        raise UserError(
            f"only: expected a tuple of measure labels, found {shown(value)}; valid: {', '.join(exp.measures)}"
        )
    for label in value:
        if label not in exp.measures:
            raise unknown("only", label, exp.measures)
    return [label for label in exp.measures if label in value]


def choose(arms: Mapping[str, Arm], names: str | None) -> list[str]:
    """The arms of ``--arms=a,b``, in the config's order; all without it."""
    if names is None:
        return list(arms)
    wanted = [n.strip() for n in names.split(",")]
    for name in wanted:
        if name not in arms:
            raise unknown("--arms", name, arms)
    return [name for name in arms if name in wanted]


@functools.lru_cache(maxsize=256)
def shapes(cfg: ModelConfig) -> tuple[Any, ...]:
    """Names, shapes and types of all parameters; nothing is allocated."""
    named = params.names(params.abstract(cfg))
    return tuple((name, leaf.shape, str(leaf.dtype)) for name, leaf in named.items())


def count(cfg: ModelConfig) -> int:
    """The number of parameters."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params.abstract(cfg)))


def check_shapes(arms: Mapping[str, Arm], base: ModelConfig) -> None:
    """Raises `UserError` when an arm asks for other parameters than the checkpoint has."""
    have = shapes(base)
    for arm in arms.values():
        want = have if arm.model == base else shapes(arm.config)
        for name, shape, dtype in set(want) ^ set(have):
            raise UserError(
                f"arms.{arm.name}: needs other parameters than the checkpoint's: {name} {shape} {dtype}; "
                "valid: overrides that keep the parameters, or checkpoint = 'random'"
            )
