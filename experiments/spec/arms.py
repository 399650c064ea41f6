"""Arms: the base model with an arm's dotted overrides, and the measures the arm runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from experiments.spec.settings import MEASURES, Experiment, change, change_measure, measure, names_first, parts
from lm.config import ModelConfig, merge, to_dict
from lm.errors import UserError, nearest, unknown
from lm.model import params
from lm.plug import table
from lm.train.config import TrainConfig

RANDOM = "random"


@dataclass(frozen=True)
class Draft(ModelConfig):
    """A model of which only names and types are checked so far; what follows from other fields is still open."""

    def __post_init__(self) -> None:
        pass

    def layers(self) -> tuple[ModelConfig, ...]:
        return ()

    def final(self) -> ModelConfig:
        """The checked model."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class Arm:
    """`measures`: label -> plug, only those that this arm runs. `train`: how its parameters are trained, and `trained`
    the model they are trained as, which `model` then reads; None for parameters that are not trained. `start`: the arm
    whose trained parameters that training starts from; None = the experiment's checkpoint."""

    name: str
    model: ModelConfig
    measures: dict[str, Any]
    train: TrainConfig | None = None
    trained: ModelConfig | None = None
    start: Arm | None = None


def base_model(exp: Experiment, checkpoint: ModelConfig | None) -> ModelConfig:
    """The model every arm starts from; `checkpoint` is the checkpoint's own, None when there is none at hand.

    A `Draft` where it stays open what follows from what: for random parameters, an arm that changes ``n_heads`` also
    changes the ``n_kv_heads`` that nobody set.
    """
    if checkpoint is not None:
        return merge(checkpoint, exp.model, "model")
    draft = merge(Draft(), exp.model, "model")
    if exp.checkpoint == RANDOM:
        draft.final()
    return draft


def resolve(exp: Experiment, base: ModelConfig) -> dict[str, Arm]:
    """Every arm, checked; raises `UserError` that names the arm and the key."""
    out = {}
    for name, changes in exp.arms.items():
        try:
            out[name] = _arm(exp, base, name, changes)
        except UserError as e:
            raise UserError(f"arms.{name}: {e}") from None
    for name in out:
        out[name] = _started(exp, out, name, ())
    return out


def _started(exp: Experiment, arms: Mapping[str, Arm], name: str, before: tuple[str, ...]) -> Arm:
    """The arm with the arm it starts from, and that one's start, and so on."""
    arm, at = arms[name], f"arms.{name}.starts_from"
    start = exp.arms[name].get("starts_from")
    if start is None:
        return arm
    if start not in arms:
        raise unknown(at, start, arms)
    if start in (*before, name):
        raise UserError(f"{at}: {start!r} starts from this arm in turn; valid: an arm that does not")
    if arm.train is None or arm.trained is None or arms[start].trained is None:
        raise UserError(f"{at}: found {start!r}, but one of the two is not trained; valid: two arms that are")
    found = _started(exp, arms, start, (*before, name))
    assert found.trained is not None
    if shapes(found.trained) != shapes(arm.trained):
        raise UserError(f"{at}: {start!r} has parameters of other shapes; valid: an arm with the same")
    return dataclasses.replace(arm, start=found)


def _arm(exp: Experiment, base: ModelConfig, name: str, changes: Mapping[str, Any]) -> Arm:
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}
    training, trains, untrained, trains_itself = exp.training(), False, False, False
    measures = {label: to_dict(m, table(MEASURES)) for label, m in exp.measures.items()}
    chosen = list(exp.measures)
    # A plug is named before its fields are set, in whatever order the keys come (ConfigDict sorts them).
    for dotted, value in names_first(changes):
        head, *rest = parts(dotted)
        if dotted == "only":
            chosen = _only(exp, value)
        elif head == "model" and rest:
            change(model, base, rest, value, "model")
        elif head == "measures" and rest:
            measures[rest[0]] = change_measure(measures, rest, value)
        elif head == "train" and rest:
            if training is None:
                raise UserError(f"{dotted}: nothing is trained; valid: set config.train, at least config.train.steps")
            change(train, training, rest, value, "train")
        elif dotted in ("trains", "untrained"):
            if not isinstance(value, bool):
                raise UserError(f"{dotted}: expected True or False, found {value!r}")
            trains, untrained = (value, untrained) if dotted == "trains" else (trains, value)
        elif dotted == "starts_from":
            trains_itself = True
        else:
            valid = "only, trains, untrained, starts_from, model.KEY, train.KEY, measures.LABEL.KEY"
            names = ("only", "trains", "untrained", "starts_from", "model", "train", "measures")
            raise UserError(f"{dotted}: unknown key{nearest(head, names)}; valid: {valid}")
    cfg = merge(base, model, "model")
    if isinstance(cfg, Draft) and (exp.checkpoint == RANDOM or "vocab_size" in exp.model):
        cfg = cfg.final()  # the config describes the whole model, also where the checkpoint is not at hand
    cfg.layers()  # refuses malformed layer overrides
    plugs = {label: measure(label, measures[label]) for label in chosen}
    if untrained and (train or trains or trains_itself):
        raise UserError("untrained: goes with no key of training; valid: one of them")
    if training is None or untrained:
        return Arm(name, cfg, plugs)
    final = base.final() if isinstance(base, Draft) else base
    # A draft's sizes come with its checkpoint.
    trained = cfg if trains or isinstance(cfg, Draft) or shapes(cfg) != shapes(final) else final
    return Arm(name, cfg, plugs, merge(training, train, "train"), trained)


def _only(exp: Experiment, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"only: expected a tuple of measure labels, found {value!r}; valid: {', '.join(exp.measures)}")
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
        want = have if arm.model == base else shapes(arm.model)
        for name, shape, dtype in set(want) ^ set(have):
            raise UserError(
                f"arms.{arm.name}: needs other parameters than the checkpoint's: {name} {shape} {dtype}; "
                "valid: overrides that keep the parameters, or checkpoint = 'random'"
            )
