"""From a nested mapping (an ml-collections ConfigDict) to frozen dataclasses, with errors a user can act on.

Every socket is a table ``NAME -> frozen dataclass``; a *plug* in a config is ``{"name": NAME, **fields}``.
The dataclass is the schema: unknown keys, wrong types and unknown names are refused here, before any array exists.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ml_collections import ConfigDict

from lm.caches.base import Cache
from lm.errors import UserError, nearest, unknown
from lm.ffn.base import FFN
from lm.heads.base import Head
from lm.mixers.base import Mixer
from lm.norms import Norm
from lm.patterns.base import Pattern
from lm.plug import Model, Table, check_bounds, socket, table
from lm.positions.base import Positions

# What the layers of one decoder have in common: the residual stream, and what is before and after the blocks.
_SHARED = ("vocab_size", "d_model", "n_layers", "dtype", "head", "embed_scale", "scan_layers")
_TYPES = ("float32", "bfloat16", "float16")


class LayerOverride(dict[str, Any]):
    """One entry of `ModelConfig.layer_overrides`: a dict that can be hashed, because nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self))


@dataclass(frozen=True)
class ModelConfig(Model):
    """Everything the decoder needs to know. Widths are numbers of channels, lengths are tokens.

    `max_positions` is the length the parameters were (or will be) trained at. `n_kv_heads=None` means `n_heads`;
    `head_dim=None` means `d_model // n_heads`. `layer_overrides` is a tuple of
    ``{"layers": "start:stop:step", <field>: value}``; later entries win.
    """

    norm: Norm = socket("lm.norms", "rmsnorm")
    mixer: Mixer = socket("lm.mixers", "softmax", saved="attention")
    pattern: Pattern = socket("lm.patterns", "causal")
    cache: Cache = socket("lm.caches", "auto", later=True)
    positions: Positions = socket("lm.positions", "rope")
    ffn: FFN = socket("lm.ffn", "swiglu")
    head: Head = socket("lm.heads", "linear")

    def __post_init__(self) -> None:
        check_bounds(self, "model")
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise UserError(
                f"model.n_kv_heads: {self.kv_heads} does not divide model.n_heads = {self.n_heads}; "
                f"valid: {', '.join(str(k) for k in range(1, self.n_heads + 1) if self.n_heads % k == 0)}"
            )
        if self.head_dim is None and self.d_model % self.n_heads:
            raise UserError(
                f"model.d_model: {self.d_model} is not divisible by model.n_heads = {self.n_heads}; set model.head_dim"
            )
        if self.head_width < 1:
            raise UserError(f"model.head_dim: must be at least 1, found {self.head_dim}")
        object.__setattr__(self, "n_kv_heads", self.kv_heads)
        object.__setattr__(self, "head_dim", self.head_width)
        object.__setattr__(self, "layer_overrides", _frozen(self.layer_overrides))
        for key, value in (("dtype", self.dtype), ("param_dtype", self.param_dtype)):
            if value not in _TYPES:
                raise unknown(f"model.{key}", value, _TYPES)
        for plug in (self.norm, self.mixer, self.pattern, self.cache, self.positions, self.ffn, self.head):
            plug.check(self)
        if self.layer_overrides:
            self.layers()  # refuses impossible overrides now, not while tracing

    def layers(self) -> tuple[ModelConfig, ...]:
        """The configuration of every layer, overrides applied and per-layer plugs resolved."""
        return _layers(self)

    def _resolved(self) -> tuple[ModelConfig, ...]:
        out = []
        for i in range(self.n_layers):
            cfg = dataclasses.replace(self, layer_overrides=())
            for n, entry in enumerate(self.layer_overrides):
                if i in _layer_range(entry, self.n_layers, f"model.layer_overrides[{n}].layers"):
                    changes = {k: v for k, v in dict(entry).items() if k != "layers"}
                    cfg = merge(cfg, changes, f"model.layer_overrides[{n}]")
                    for name in _SHARED:
                        if vars(cfg)[name] != vars(self)[name]:
                            raise UserError(f"model.layer_overrides[{n}].{name}: cannot differ between layers")
            pattern, ffn = cfg.pattern.for_layer(i), cfg.ffn.for_layer(i)
            same = pattern is cfg.pattern and ffn is cfg.ffn
            out.append(cfg if same else dataclasses.replace(cfg, pattern=pattern, ffn=ffn))
        return tuple(out)


@functools.lru_cache(maxsize=256)
def _layers(cfg: ModelConfig) -> tuple[ModelConfig, ...]:
    return cfg._resolved()


def _frozen(entries: tuple[Any, ...]) -> tuple[LayerOverride, ...]:
    for n, entry in enumerate(entries):
        if not is_mapping(entry) or "layers" not in entry:
            raise UserError(
                f"model.layer_overrides[{n}]: found {entry!r}; valid: a mapping with 'layers' and fields of the model"
            )
    return tuple(LayerOverride(_plain(entry)) for entry in entries)


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether `value` is a mapping, or behaves as one (a ConfigDict)."""
    return isinstance(value, (Mapping, ConfigDict))


def _plain(value: object) -> Any:
    """A copy in plain dicts of what may be a ConfigDict of ConfigDicts."""
    return {k: _plain(v) for k, v in value.items()} if is_mapping(value) else value


def _layer_range(entry: Mapping[str, Any], n: int, key: str) -> range:
    text = str(entry.get("layers", ""))
    try:
        parts = [int(p) if p.strip() else None for p in text.split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or (len(parts) == 1 and parts[0] is None) or parts[2:] == [0]:
        raise UserError(f"{key}: found {text!r}; valid: 'i' or 'start:stop:step'")
    if len(parts) == 1:
        if not -n <= (parts[0] or 0) < n:
            raise UserError(f"{key}: found {text!r}; valid: a layer from 0 to {n - 1}")
        parts = [parts[0], (parts[0] or 0) + 1 or None]
    return range(n)[slice(*parts)]


def model_config(cfg: Mapping[str, Any]) -> ModelConfig:
    """``ModelConfig`` from a mapping; raises `UserError` that names the key ``model.…``."""
    return build(ModelConfig, cfg, "model")


def build(cls: type, cfg: object, key: str) -> Any:
    """An instance of dataclass `cls` from mapping `cfg`; `key` is the dotted place for error messages."""
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return cfg
    if not is_mapping(cfg):
        raise UserError(f"{key}: expected a mapping, found {cfg!r}")
    fields, old = {f.name: f for f in dataclasses.fields(cls)}, saved_names(cls)
    hints = typing.get_type_hints(cls)
    values = {}
    for given, value in cfg.items():
        name = old.get(given, given)
        if name not in fields:
            raise UserError(f"{key}.{name}: unknown key{nearest(name, fields)}; valid: {', '.join(sorted(fields))}")
        place = f"{key}.{name}"
        module = fields[name].metadata.get("socket")
        values[name] = plug(module, value, place) if module else coerce(value, hints[name], place)
    return cls(**values)


def plug(module: str, value: object, key: str) -> Any:
    """A plug instance from ``"name"`` or ``{"name": …, **fields}``."""
    options = table(module)
    if options.name_of(type(value)) is not None:
        return value
    fields = {"name": value} if isinstance(value, str) else dict(value.items()) if is_mapping(value) else None
    if fields is None or "name" not in fields:
        raise UserError(f"{key}.name: missing in {value!r}; valid: {', '.join(sorted(options))}")
    name = fields.pop("name")
    if not isinstance(name, str) or name not in options:
        raise unknown(f"{key}.name", name, options)
    return build(options[name], fields, key)


def coerce(value: object, hint: Any, key: str) -> Any:
    """`value` as type `hint` or a `UserError`; an int is accepted where a float is asked, a list where a tuple is."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return coerce(value, option, key)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
        raise unknown(key, value, args)
    elif origin is tuple and isinstance(value, (list, tuple, str)):
        inner = args[0] if args else Any
        if isinstance(value, str):  # one name where a list of names is asked
            return (coerce(value, inner, key),)
        return tuple(coerce(v, inner, f"{key}[{i}]") for i, v in enumerate(value))
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint in (bool, int, str) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    elif origin in (dict, Mapping) and is_mapping(value):
        return dict(value.items())
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    raise UserError(f"{key}: expected {_show(hint)}, found {value!r} ({type(value).__name__})")


def _show(hint: object) -> str:
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_show(a) for a in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def merge(base: Any, changes: Mapping[str, Any], key: str) -> Any:
    """`base` (a dataclass instance) with a nested mapping of changes; naming another plug replaces the old plug."""
    fields, old = {f.name: f for f in dataclasses.fields(base)}, saved_names(type(base))
    hints = typing.get_type_hints(type(base))
    out = {}
    for given, value in changes.items():
        name = old.get(given, given)
        if name not in fields:
            raise UserError(f"{key}.{name}: unknown key{nearest(name, fields)}; valid: {', '.join(sorted(fields))}")
        place, module = f"{key}.{name}", fields[name].metadata.get("socket")
        current = vars(base)[name]
        if module and is_mapping(value):
            rest = dict(value.items())
            named = rest.pop("name", None)
            same = named is None or table(module).get(named) is type(current)
            out[name] = merge(current, rest, place) if same else plug(module, value, place)
        elif dataclasses.is_dataclass(current) and not module and is_mapping(value):
            out[name] = merge(current, value, place)
        else:
            out[name] = plug(module, value, place) if module else coerce(value, hints[name], place)
    return dataclasses.replace(base, **out)


def saved_names(cls: type) -> dict[str, str]:
    """Older names of fields, which are still read and by which they are written -> the names they have now."""
    return {f.metadata["saved"]: f.name for f in dataclasses.fields(cls) if "saved" in f.metadata}


def to_dict(cfg: object, options: Table | None = None) -> Any:
    """The inverse of `build`: plain nested dicts, plugs as ``{"name": …}``; JSON-ready and hashable by content. Fields
    are written under their saved names, so that what is addressed by its content keeps its address."""
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        out: dict[str, Any] = {}
        if options is not None:
            out["name"] = options.name_of(type(cfg))
        for f in dataclasses.fields(cfg):
            value, module = vars(cfg)[f.name], f.metadata.get("socket")
            if f.metadata.get("later") and value == (table(module)[f.metadata["default"]]() if module else {}):
                continue
            out[f.metadata.get("saved", f.name)] = to_dict(value, table(module) if module else None)
        return out
    if isinstance(cfg, (list, tuple)):
        return [to_dict(c) for c in cfg]
    return {k: to_dict(v) for k, v in cfg.items()} if is_mapping(cfg) else cfg
