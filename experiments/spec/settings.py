"""From a config file's settings to a checked `Experiment`, and overrides by dotted key.

The settings are plain nested dicts (`plain`). Overrides change them in place of the file's values: ``model.…`` are
changes over the checkpoint's model, ``measures.<label>.…`` fields of a measure, ``arms.<arm>.…`` an arm's own
overrides. Naming a plug (``model.pattern.name = X``, or ``model.pattern = X``) starts over from that plug's defaults.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import re
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from lm.config import Dotted, ModelConfig, build, coerce, is_mapping, merge, overlay, overlay_plug, plug, to_dict
from lm.errors import UserError, nearest, shown, unknown
from lm.interop import PLUS
from lm.measures import Measure
from lm.nested import flat
from lm.plug import SEEDS, table
from lm.train.config import TrainConfig

MEASURES = "lm.measures"
RANDOM = "random"  # the checkpoint of parameters drawn by seed
Settings = Mapping[str, object]


@dataclass(frozen=True)
class Paper:
    """`numbers`: what the paper reports, as text or numbers by name."""

    title: str = ""
    arxiv: str = ""
    claim: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One experiment, checked as far as possible without its checkpoint.

    `model`: nested changes over the checkpoint's configuration (the whole model for checkpoint ``random``); `train`:
    settings of `lm.train.TrainConfig`, and then arms measure what training makes of the checkpoint (empty: they measure
    the checkpoint); `arms`: arm -> {dotted key: value}, in order; `measures`: label -> plug of `lm.measures`;
    `architecture`: the file of ``configs/bases`` that says what the checkpoint's model is, for plans made without it;
    `adapter`: a PEFT adapter that the checkpoint is read with.
    """

    name: str
    scale: str
    checkpoint: str
    baseline: str
    arms: dict[str, Any]
    measures: dict[str, Measure]
    paper: Paper = field(default_factory=Paper)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    architecture: str = ""
    adapter: str = ""

    def training(self) -> TrainConfig | None:
        """The checked settings of training; None where there is none. Raises `UserError`."""
        return merge(TrainConfig(), self.train, "train") if self.train else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready settings that build this experiment again; measures with all their fields."""
        out = to_dict(self)
        out["measures"] = {label: to_dict(m, table(MEASURES)) for label, m in self.measures.items()}
        training = self.training()
        out["train"] = {} if training is None else to_dict(training)
        for later in ("architecture", "adapter"):
            if not out[later]:
                del out[later]  # run folders from before there was one stay the same
        return plain(out, lists=True)


def plain(cfg: object, lists: bool = False) -> Any:
    """Nested `ConfigDict`s (or any mappings) as nested dicts in the order of definition; with `lists`, tuples as
    lists."""
    if is_mapping(cfg):
        items = dict(cfg.items())
        order = cfg._fields if isinstance(cfg, ConfigDict) else items  # its `items` are sorted by name
        return {str(k): plain(items[k], lists) for k in order}
    if isinstance(cfg, (list, tuple)):
        values = [plain(v, lists) for v in cfg]
        return values if lists or isinstance(cfg, list) else tuple(values)
    return cfg


def _complete(settings: object) -> dict[str, Any]:
    """Settings that have all keys an experiment needs."""
    if not is_mapping(settings):
        raise UserError(f"get_config: expected a ConfigDict, found {type(settings).__name__}")
    fields = {f.name: f for f in dataclasses.fields(Experiment)}
    for name, f in fields.items():
        if name not in settings and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"config.{name}: missing; valid: {', '.join(fields)}")
    return dict(settings.items())


def places(settings: object) -> tuple[str, str]:
    """The checkpoint with its adapter, and the architecture that stands for it where it is not at hand (empty for
    none)."""
    raw = _complete(settings)
    checkpoint = coerce(raw["checkpoint"], str, "config.checkpoint")
    if not checkpoint.strip():
        raise UserError("config.checkpoint: is empty; valid: a name")
    adapter = coerce(raw.get("adapter", ""), str, "config.adapter")
    if adapter and checkpoint == RANDOM:
        raise UserError(f"config.adapter: found {shown(adapter)} to random parameters; valid: with a checkpoint")
    source = f"{checkpoint}{PLUS}{adapter}" if adapter else checkpoint
    return source, coerce(raw.get("architecture", ""), str, "config.architecture")


def experiment(settings: object) -> Experiment:
    """The checked experiment; raises `UserError` that names the key. Arms are checked by `experiments.spec.arms`."""
    raw = _complete(settings)
    labels = raw.get("measures")
    if is_mapping(labels):
        raw["measures"] = {label: measure(label, value) for label, value in labels.items()}
    places(raw)
    exp = build(Experiment, raw, "config")
    assert isinstance(exp, Experiment)
    exp.training()
    for what, text in (("name", exp.name), ("scale", exp.scale)):
        if not text.strip():
            raise UserError(f"config.{what}: is empty; valid: a name")
        if not re.fullmatch(r"[\w@+-][\w@+. -]{0,99}", text):  # it names the run's folder
            raise UserError(
                f"config.{what}: found {shown(text)}; valid: up to 100 letters, digits, blanks and _ @ + - ., "
                "which does not come first"
            )
    for what, named in (("arms", exp.arms), ("measures", exp.measures)):
        if not named:
            raise UserError(f"config.{what}: is empty; valid: at least one")
        for name in named:
            if not re.fullmatch(r"[\w@+-]{1,100}", name):
                raise UserError(f"config.{what}: found the name {shown(name)}; valid: letters, digits and _ @ + -")
    if exp.baseline not in exp.arms:
        raise unknown("config.baseline", exp.baseline, exp.arms)
    # ConfigDict sorts its keys; tables and plots start with what everything is compared to.
    first = {exp.baseline: exp.arms[exp.baseline]}
    exp = dataclasses.replace(exp, arms={**first, **exp.arms})
    if not exp.seeds or len(set(exp.seeds)) < len(exp.seeds) or not 0 <= min(exp.seeds) <= max(exp.seeds) < SEEDS:
        valid = f"one or more different numbers from 0 to {SEEDS - 1}"
        raise UserError(f"config.seeds: found {shown(exp.seeds)}; valid: {valid}")
    for arm, changes in exp.arms.items():
        if not is_mapping(changes):
            raise UserError(f"arms.{arm}: expected a mapping from dotted keys to values, found {shown(changes)}")
    _check_written(exp)
    return exp


def _check_written(exp: Experiment) -> None:
    """Raises `UserError` for settings that config.json cannot keep."""
    said = plain({"arms": exp.arms, "paper": vars(exp.paper), "model": exp.model}, lists=True)
    for place, value in flat(said, "config.").items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise UserError(
                f"{place}: found {shown(value)}; valid: text, finite numbers, True, False, None, and lists of these"
            ) from None


def measure(label: str, value: object) -> Measure:
    """A measure plug from ``{"name": …, **fields}``."""
    made = plug(MEASURES, value, f"measures.{label}")
    assert isinstance(made, Measure)
    return made


class Text(str):
    """A value as typed on the command line: a Python literal where one fits, else a string."""

    def literal(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of what only looks like Python
                return ast.literal_eval(self.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return str(self)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, Text]]]:
    """All other arguments, and the overrides ``(dotted key, value)`` of ``--config.KEY=VALUE`` in order."""
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if word.startswith("--config."):
            name, equals, value = word.removeprefix("--config.").partition("=")
            overrides.append((name, Text(value if equals else next(words, ""))))
        else:
            rest.append(word)
    return rest, overrides


def fit(value: object, hint: Any, place: str) -> Any:
    """`value` as `hint`. Typed ``123`` stays a string where a string is asked for."""
    if not isinstance(value, Text):
        return coerce(value, hint, place)
    try:
        return coerce(value.literal(), hint, place)
    except UserError:
        try:
            return coerce(str(value), hint, place)
        except UserError:
            pass
        raise


def change(cls: type, settings: object, path: Sequence[str], value: object, key: str, base: object = None) -> Any:
    """Settings of dataclass `cls` with the key at `path` changed. `base`: what lies below them, which says what plug an
    unnamed ``pattern.window`` belongs to."""
    return overlay(cls, settings, Dotted.of(path, value), key, base, fit)


def override(settings: Settings, dotted: str, value: object, base: object = None) -> dict[str, Any]:
    """A copy of `settings` with one key changed; `value` is any value, or a `Text` from the command line.

    `base` is the model that ``model.…`` changes, None where there is none but what the settings describe.
    Raises `UserError` for an unknown key, arm, label or plug and for a value of the wrong type.
    """
    out: dict[str, Any] = copy.deepcopy(dict(settings))
    head, *rest = parts(dotted)
    hints = typing.get_type_hints(Experiment)
    if head in ("arms", "measures") and not is_mapping(out.get(head)):
        raise UserError(f"config.{head}: expected a mapping, found {shown(out.get(head))}")
    if head not in hints:
        raise UserError(f"config.{head}: unknown key{nearest(head, hints)}; valid: {', '.join(sorted(hints))}")
    if head == "scale":
        raise UserError("config.scale: is set by --config=FILE.py:SCALE")
    if head == "model" and rest:
        out["model"] = change(ModelConfig, out.get("model"), rest, value, "model", {} if base is None else base)
    elif head == "train" and rest:
        out["train"] = change(TrainConfig, out.get("train"), rest, value, "train", {})
    elif head == "measures" and rest:
        out["measures"][rest[0]] = change_measure(out["measures"], rest, value)
    elif head == "arms" and rest:
        out["arms"] = _change_arm(out["arms"], rest, value)
    elif head == "paper" and rest:
        out["paper"] = change(Paper, out.get("paper"), rest, value, "config.paper")
    elif rest:
        raise UserError(f"config.{dotted}: unknown key; config.{head} has no keys below it")
    elif head in ("model", "train", "arms", "measures", "paper"):
        raise UserError(f"config.{head}: name the key to change, config.{head}.KEY")
    else:
        out[head] = fit(value, hints[head], f"config.{head}")
    return out


def _change_arm(arms: Mapping[str, Any], path: Sequence[str], value: object) -> dict[str, Any]:
    """The arms with one arm's own override set; of a plug that is replaced, its fields go."""
    arm, keys = path[0], path[1:]
    if arm not in arms:
        raise unknown("config.arms", arm, arms)
    if not keys:
        raise UserError(f"config.arms.{arm}: name the key to change, for example arms.{arm}.model.pattern=causal")
    key = ".".join(keys)
    over = key.removesuffix(".name") + "."  # another plug: its fields start over
    now = {k: v for k, v in arms[arm].items() if k != key and not k.startswith(over)}
    return {**arms, arm: {**now, key: value.literal() if isinstance(value, Text) else value}}


def names_first(changes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted changes, those that name a plug before those that set its fields, outer plugs first."""

    def order(item: tuple[str, Any]) -> tuple[bool, int]:
        key = item[0]
        names = key.endswith(".name") or any(other.startswith(key + ".") for other in changes)
        return not names, key.removesuffix(".name").count(".") if names else 0

    return sorted(changes.items(), key=order)


def parts(dotted: str) -> list[str]:
    keys = str(dotted).split(".")
    if not all(keys):
        raise UserError(f"config.{dotted}: empty part in a dotted key")
    return keys


def change_measure(measures: Mapping[str, Any], path: Sequence[str], value: object) -> Any:
    """The settings of measure ``path[0]`` with field ``path[1]`` changed, or with another plug named."""
    label, *keys = path
    if label not in measures:
        raise unknown(f"measures.{label}", label, measures)
    place = f"measures.{label}"
    return overlay_plug(MEASURES, measures[label], Dotted.of(keys, value), place, fresh=not keys, fit=fit)
