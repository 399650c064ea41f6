"""From a config file's settings to a checked `Experiment`, and overrides by dotted key.

The settings are plain nested dicts (`plain`). Overrides change them in place of the file's values: ``model.…`` are
changes over the checkpoint's model, ``measures.<label>.…`` fields of a measure, ``arms.<arm>.…`` an arm's own
overrides. Naming a plug (``model.pattern.name = X``, or ``model.pattern = X``) starts over from that plug's defaults.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.config import ModelConfig, build, coerce, merge, plug, saved_names, to_dict
from lm.errors import UserError, nearest, unknown
from lm.plug import Table, table
from lm.train.config import TrainConfig

MEASURES = "lm.measures"


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
    `architecture`: the file of ``configs/bases`` that says what the checkpoint's model is, for plans made without it.
    """

    name: str
    scale: str
    checkpoint: str
    baseline: str
    arms: dict[str, Any]
    measures: dict[str, Any]
    paper: Paper = field(default_factory=Paper)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    architecture: str = ""

    def training(self) -> TrainConfig | None:
        """The checked settings of training; None where there is none. Raises `UserError`."""
        return merge(TrainConfig(), self.train, "train") if self.train else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready settings that build this experiment again; measures with all their fields."""
        out = to_dict(self)
        out["measures"] = {label: to_dict(m, table(MEASURES)) for label, m in self.measures.items()}
        training = self.training()
        out["train"] = {} if training is None else to_dict(training)
        if not self.architecture:
            del out["architecture"]  # run folders from before there was one stay the same
        return plain(out, lists=True)


def plain(cfg: Any, lists: bool = False) -> Any:
    """Nested `ConfigDict`s (or any mappings) as nested dicts in the order of definition; with `lists`, tuples as
    lists."""
    if hasattr(cfg, "items"):
        items = dict(cfg.items())
        order = getattr(cfg, "_fields", items)  # a ConfigDict lists its items by name, but keeps them as defined
        return {str(k): plain(items[k], lists) for k in order}
    if isinstance(cfg, (list, tuple)):
        values = [plain(v, lists) for v in cfg]
        return values if lists or isinstance(cfg, list) else tuple(values)
    return cfg


def experiment(settings: Mapping[str, Any]) -> Experiment:
    """The checked experiment; raises `UserError` that names the key. Arms are checked by `experiments.spec.arms`."""
    if not hasattr(settings, "items"):
        raise UserError(f"get_config: expected a ConfigDict, found {type(settings).__name__}")
    raw = dict(settings)
    fields = {f.name: f for f in dataclasses.fields(Experiment)}
    for name, f in fields.items():
        if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"config.{name}: missing; valid: {', '.join(fields)}")
    labels: Any = raw.get("measures")
    if hasattr(labels, "items"):
        raw["measures"] = {label: measure(label, value) for label, value in labels.items()}
    exp = build(Experiment, raw, "config")
    exp.training()
    for what in ("name", "scale", "checkpoint"):
        if not getattr(exp, what).strip():
            raise UserError(f"config.{what}: is empty; valid: a name")
    for what in ("arms", "measures"):
        if not getattr(exp, what):
            raise UserError(f"config.{what}: is empty; valid: at least one")
        for name in getattr(exp, what):
            if not re.fullmatch(r"[\w@+-]+", name):
                raise UserError(f"config.{what}: found the name {name!r}; valid: letters, digits and _ @ + -")
    if exp.baseline not in exp.arms:
        raise unknown("config.baseline", exp.baseline, exp.arms)
    # ConfigDict sorts its keys; tables and plots start with what everything is compared to.
    first = {exp.baseline: exp.arms[exp.baseline]}
    exp = dataclasses.replace(exp, arms={**first, **exp.arms})
    if not exp.seeds or len(set(exp.seeds)) < len(exp.seeds) or min(exp.seeds) < 0:
        raise UserError(f"config.seeds: found {exp.seeds}; valid: one or more different numbers from 0 on")
    for arm, changes in exp.arms.items():
        if not hasattr(changes, "items"):
            raise UserError(f"arms.{arm}: expected a mapping from dotted keys to values, found {changes!r}")
    return exp


def measure(label: str, value: Any) -> Any:
    """A measure plug from ``{"name": …, **fields}``; one string is accepted where several are asked for."""
    if hasattr(value, "items") and value.get("name") in table(MEASURES):
        hints = typing.get_type_hints(table(MEASURES)[value["name"]])
        value = {k: _strings(v, hints.get(k)) for k, v in value.items()}
    return plug(MEASURES, value, f"measures.{label}")


def _strings(value: Any, hint: Any) -> Any:
    return (value,) if isinstance(value, str) and hint == tuple[str, ...] else value


class Text(str):
    """A value as typed on the command line: a Python literal where one fits, else a string."""

    def literal(self) -> Any:
        try:
            return ast.literal_eval(self.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return str(self)


def _fit(value: Any, hint: Any, place: str) -> Any:
    """`value` as `hint`. Typed ``123`` stays a string where a string is asked for."""
    if not isinstance(value, Text):
        return coerce(_strings(value, hint), hint, place)
    try:
        return coerce(_strings(value.literal(), hint), hint, place)
    except UserError:
        try:
            return coerce(str(value), hint, place)
        except UserError:
            pass
        raise


def override(settings: Mapping[str, Any], dotted: str, value: Any, base: Any = ModelConfig) -> dict[str, Any]:
    """A copy of `settings` with one key changed; `value` is any value, or a `Text` from the command line.

    `base` is the model that ``model.…`` changes: it says which plug an unnamed ``model.pattern.window`` belongs to.
    Raises `UserError` for an unknown key, arm, label or plug and for a value of the wrong type.
    """
    out = copy.deepcopy(dict(settings))
    head, *rest = parts(dotted)
    hints = typing.get_type_hints(Experiment)
    if head not in hints:
        raise UserError(f"config.{head}: unknown key{nearest(head, hints)}; valid: {', '.join(sorted(hints))}")
    if head == "scale":
        raise UserError("config.scale: is set by --config=FILE.py:SCALE")
    if head == "model" and rest:
        change(out.setdefault("model", {}), base, rest, value, "model")
    elif head == "train" and rest:
        change(out.setdefault("train", {}), TrainConfig, rest, value, "train")
    elif head == "measures" and rest:
        out["measures"][rest[0]] = change_measure(out["measures"], rest, value)
    elif head == "arms" and rest:
        arm, keys = rest[0], rest[1:]
        if arm not in out["arms"]:
            raise unknown("config.arms", arm, out["arms"])
        if not keys:
            raise UserError(f"config.arms.{arm}: name the key to change, for example arms.{arm}.model.pattern=causal")
        key = ".".join(keys)
        over = key.removesuffix(".name") + "."  # another plug: its fields start over
        now = {k: v for k, v in out["arms"][arm].items() if k != key and not k.startswith(over)}
        out["arms"][arm] = {**now, key: value.literal() if isinstance(value, Text) else value}
    elif head == "paper" and rest:
        sub = typing.get_type_hints(Paper)
        if rest[0] not in sub or rest[1:]:
            raise UserError(f"config.{dotted}: unknown key{nearest(rest[0], sub)}; valid: {', '.join(sorted(sub))}")
        out.setdefault("paper", {})[rest[0]] = _fit(value, sub[rest[0]], f"config.{dotted}")
    elif rest:
        raise UserError(f"config.{dotted}: unknown key; config.{head} has no keys below it")
    elif head in ("model", "train", "arms", "measures", "paper"):
        raise UserError(f"config.{head}: name the key to change, config.{head}.KEY")
    else:
        out[head] = _fit(value, hints[head], f"config.{head}")
    return out


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


def change_measure(measures: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """The settings of measure ``path[0]`` with field ``path[1]`` changed, or with another plug named."""
    label, *keys = path
    if label not in measures:
        raise unknown(f"measures.{label}", label, measures)
    place, options = ".".join(["measures", *path]), table(MEASURES)
    if keys in ([], ["name"]):
        name = value.literal() if isinstance(value, Text) else value
        if not isinstance(name, str) or name not in options:
            raise unknown(f"measures.{label}.name", name, options)
        return {"name": name}
    now = dict(measures[label])
    cls = options.get(str(now.get("name")))
    if cls is None:
        raise unknown(f"measures.{label}.name", now.get("name"), options)
    hints = {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    if keys[0] not in hints or keys[1:]:
        raise UserError(f"{place}: unknown key{nearest(keys[0], hints)}; valid: {', '.join(sorted(hints))}")
    return {**now, keys[0]: _fit(value, hints[keys[0]], place)}


def change(changes: dict[str, Any], holder: Any, path: Sequence[str], value: Any, key: str) -> None:
    """Puts `value` at `path` into the nested `changes` over `holder`, a dataclass or an instance of one.

    The result is for `lm.config.merge`. A plug is named with all its defaults spelled out, so that nothing of the plug
    it replaces is left, whichever that turns out to be.
    """
    cls = holder if isinstance(holder, type) else type(holder)
    head, *rest = path
    head = saved_names(cls).get(head, head)
    fields, place = {f.name: f for f in dataclasses.fields(cls)}, f"{key}.{head}"
    if head not in fields:
        raise UserError(f"{place}: unknown key{nearest(head, fields)}; valid: {', '.join(sorted(fields)) or 'none'}")
    module, hint = fields[head].metadata.get("socket"), typing.get_type_hints(cls)[head]
    if module is None and rest and dataclasses.is_dataclass(hint):
        inner = dict(changes.get(head, {}).items())
        change(inner, hint if isinstance(holder, type) else getattr(holder, head), rest, value, place)
        changes[head] = inner
        return
    if module is None:
        if rest:
            raise UserError(f"{place}.{rest[0]}: unknown key; {place} has no keys below it")
        changes[head] = _fit(value, hint, place)
        return
    options = table(module)
    if rest in ([], ["name"]):
        value = value.literal() if isinstance(value, Text) else value
        if not rest and hasattr(value, "items"):
            changes[head] = to_dict(plug(module, value, place), options)
            return
        if not isinstance(value, str) or value not in options:
            raise unknown(f"{place}.name", value, options)
        changes[head] = _defaults(options, value)
        return
    now = changes.get(head, {})
    inner = {"name": now} if isinstance(now, str) else dict(now.items())
    default = getattr(holder, head, None) if not isinstance(holder, type) else None
    named = inner.get("name", fields[head].metadata["default"] if default is None else None)
    change(inner, default if named is None else options[named], rest, value, place)
    changes[head] = inner


def _defaults(options: Table, name: str) -> dict[str, Any]:
    try:
        return to_dict(options[name](), options)
    except TypeError:  # a field without a default: the keys that follow must set it
        return {"name": name}
