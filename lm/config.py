"""From a nested mapping (an ml-collections ConfigDict) to frozen dataclasses, with errors a user can act on.

Every socket is a table ``NAME -> frozen dataclass``; a *plug* in a config is ``{"name": NAME, **fields}``.
The dataclass is the schema: unknown keys, wrong types and unknown names are refused here, before any array exists.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ml_collections import ConfigDict

from lm.caches.base import Cache
from lm.errors import UserError, check_number, divisors, nearest, shown, unknown
from lm.ffn.base import FFN
from lm.heads.base import Head
from lm.mixers.base import Mixer
from lm.norms import Norm
from lm.patterns.base import Pattern
from lm.plug import WIDEST, Model, Plug, Table, check_bounds, socket, table
from lm.positions.base import Positions

# What the layers of one decoder have in common: the residual stream, and what is before and after the blocks.
_SHARED = ("vocab_size", "d_model", "n_layers", "dtype", "head", "embed_scale", "scan_layers")
_TYPES = ("float32", "bfloat16", "float16")
_SCALARS = (bool, int, float, str, type(None))


class LayerOverride(dict[str, Any]):
    """One entry of `ModelConfig.layer_overrides`: a dict that can be hashed, because nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self))


@dataclass(frozen=True)
class ModelConfig(Model):
    """Everything the decoder needs to know. Widths are numbers of channels, lengths are tokens.

    `max_positions` is the length the parameters were (or will be) trained at. `n_kv_heads=None` means `n_heads`;
    `head_dim=None` means `d_model // n_heads`. `norm_place`: where a block's norms stand, on what its layers read
    (``input``), on what they give (``output``), or ``both``. `layer_overrides` is a tuple of
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
                f"valid: {divisors(self.n_heads)}"
            )
        if self.head_dim is None and self.d_model % self.n_heads:
            raise UserError(
                f"model.d_model: {self.d_model} is not divisible by model.n_heads = {self.n_heads}; set model.head_dim"
            )
        if self.head_width < 1:
            raise UserError(f"model.head_dim: must be at least 1, found {self.head_dim}")
        if self.head_width > WIDEST:
            raise UserError(f"model.head_dim: must be at most {WIDEST:,}, found {self.head_dim}")
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
                f"model.layer_overrides[{n}]: found {shown(entry)}; valid: a mapping with 'layers' and fields of the "
                "model"
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
        raise UserError(f"{key}: found {shown(text)}; valid: 'i' or 'start:stop:step'")
    if len(parts) == 1:
        if not -n <= (parts[0] or 0) < n:
            raise UserError(f"{key}: found {shown(text)}; valid: a layer from 0 to {n - 1}")
        parts = [parts[0], (parts[0] or 0) + 1 or None]
    return range(n)[slice(*parts)]


def model_config(cfg: Mapping[str, Any]) -> ModelConfig:
    """``ModelConfig`` from a mapping; raises `UserError` that names the key ``model.…``."""
    return build(ModelConfig, cfg, "model")


def build(cls: type, cfg: object, key: str) -> Any:
    """An instance of dataclass `cls` from mapping `cfg`; `key` is the dotted place for error messages."""
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return cfg
    made = cls(**checked(cls, cfg, key))
    if isinstance(made, Plug):
        check_bounds(made, key)
    return made


def checked(cls: type, cfg: object, key: str) -> dict[str, Any]:
    """The fields of dataclass `cls` that mapping `cfg` sets, each checked for itself, plugs built."""
    if not is_mapping(cfg):
        raise UserError(f"{key}: expected a mapping, found {shown(cfg)}")
    fields, old = {f.name: f for f in dataclasses.fields(cls)}, saved_names(cls)
    hints = typing.get_type_hints(cls)
    values = {}
    for given, value in cfg.items():
        name = old.get(given, given)
        if name not in fields:
            raise UserError(f"{key}.{name}: unknown key{nearest(name, fields)}; valid: {', '.join(sorted(fields))}")
        place = f"{key}.{name}"
        module = fields[name].metadata.get("socket")
        values[name] = plug(module, value, place) if module else coerce(value, _asked(fields[name], hints), place)
    return values


class _Endless:
    """The type of a float field that takes infinity and NaN too: ``field(metadata={"finite": False})``."""


def _asked(f: dataclasses.Field[Any], hints: Mapping[str, Any]) -> Any:
    """The type that a field asks for."""
    return hints[f.name] if f.metadata.get("finite", True) else _Endless


def plug(module: str, value: object, key: str) -> Any:
    """A plug instance from ``"name"`` or ``{"name": …, **fields}``."""
    options = table(module)
    if options.name_of(type(value)) is not None:
        return value
    fields = {"name": value} if isinstance(value, str) else dict(value.items()) if is_mapping(value) else None
    if fields is None or "name" not in fields:
        raise UserError(f"{key}.name: missing in {shown(value)}; valid: {', '.join(sorted(options))}")
    name = fields.pop("name")
    if not isinstance(name, str) or name not in options:
        raise unknown(f"{key}.name", name, options)
    return build(options[name], fields, key)


def coerce(value: object, hint: Any, key: str) -> Any:
    """`value` as type `hint` or a `UserError`; an int is accepted where a float is asked, a list where a tuple is.
    Numbers are finite and no larger than `lm.errors.LARGEST`."""
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
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise unknown(key, value, [str(arg) for arg in args])
    elif origin is tuple and isinstance(value, (list, tuple, str)):
        inner = args[0] if args else Any
        if isinstance(value, str):  # one name where a list of names is asked
            return (coerce(value, inner, key),)
        return tuple(coerce(v, inner, f"{key}[{i}]") for i, v in enumerate(value))
    elif hint is type(None):
        if value is None:
            return None
    elif hint is _Endless:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        hint = float
    elif hint in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        check_number(value, key)
        if hint is float or isinstance(value, int):
            return hint(value)
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    elif origin in (dict, Mapping) and is_mapping(value):
        inner = args[1] if args else Any
        for name in value:
            if not isinstance(name, str):
                raise UserError(f"{key}: found the key {shown(name)}; valid: texts as keys")
        return {name: coerce(v, inner, f"{key}.{name}") for name, v in value.items()}
    elif isinstance(hint, type) and hint not in _SCALARS and isinstance(value, hint):
        return value
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    raise UserError(f"{key}: expected {_show(hint)}, found {shown(value)} ({type(value).__name__})")


def _show(hint: object) -> str:
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_show(a) for a in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


class Dotted(dict[str, Any]):
    """The change of one dotted key as nested mappings of one key each; a plug that it names starts over."""

    @staticmethod
    def of(path: Sequence[str], value: Any) -> Any:
        """``a.b = value`` of ``("a", "b")``; `value` itself of no path."""
        return Dotted({path[0]: Dotted.of(path[1:], value)}) if path else value


Fit = Callable[[Any, Any, str], Any]  # (value, type, place) -> the value as that type, as `coerce`


def overlay(
    cls: type, under: Any, changes: Mapping[str, Any], key: str, base: Any = None, fit: Fit = coerce
) -> dict[str, Any]:
    """Settings of dataclass `cls`: `under` (a mapping, or an instance) with the nested mapping `changes` over it.

    Names and types of changes are checked here, what they come to by `build`. Another plug by name replaces the old
    one; a `Dotted` change that names one also where it is the same. `base`: of settings that are changes themselves, a
    mapping or an instance that they change and that says which plug is meant where they name none; such settings name
    a plug only where they replace it.
    """
    fields, old, hints = {f.name: f for f in dataclasses.fields(cls)}, saved_names(cls), typing.get_type_hints(cls)
    out, below = _opened(under), _opened(base)
    for given, value in changes.items():
        name = old.get(given, given)
        if name not in fields:
            valid = ", ".join(sorted(fields)) or "none"
            raise UserError(f"{key}.{name}: unknown key{nearest(name, fields)}; valid: {valid}")
        place, module = f"{key}.{name}", fields[name].metadata.get("socket")
        at = next((k for k in out if old.get(k, k) == name), name)
        deeper = None if base is None else below.get(name, {})
        if module:
            default, fresh = fields[name].metadata["default"], isinstance(changes, Dotted)
            out[at] = overlay_plug(module, out.get(at), value, place, deeper, default, fresh, fit)
        elif dataclasses.is_dataclass(hints[name]) and is_mapping(value):
            out[at] = overlay(hints[name], out.get(at), value, place, deeper, fit)
        elif isinstance(value, Dotted):
            raise UserError(f"{place}.{next(iter(value))}: unknown key; {place} has no keys below it")
        else:
            out[at] = fit(value, _asked(fields[name], hints), place)
    return out


def overlay_plug(
    module: str,
    now: Any,
    value: Any,
    place: str,
    base: Any = None,
    default: str | None = None,
    fresh: bool = False,
    fit: Fit = coerce,
) -> Any:
    """`overlay` of a plug of socket `module`. `default`: the plug's name where nothing says another. `fresh`: `value`
    is all there is of it, and it starts over."""
    options, inside = table(module), isinstance(value, Dotted)
    value = value if inside else fit(value, Any, place)
    if options.name_of(type(value)) is not None:
        return value
    named = value.get("name") if inside else None
    if named is not None and not isinstance(named, Dotted):
        value, inside, fresh = fit(named, Any, place), False, True
    if isinstance(value, str) or (fresh and not inside):
        if not is_mapping(value) and (not isinstance(value, str) or value not in options):
            raise unknown(f"{place}.name", value, options)
        try:
            return to_dict(plug(module, value, place), options)
        except TypeError:  # a field without a default: the keys that follow must set it
            return {"name": value} if isinstance(value, str) else dict(value.items())
    if not is_mapping(value):
        return plug(module, value, place)  # raises
    under, below = _opened(now, options), _opened(base, options)
    rest = value if isinstance(value, Dotted) else dict(value.items())
    own, given = under.pop("name", None), None if inside else rest.pop("name", None)
    standing = own or below.pop("name", None) or default
    name = standing if given is None else given
    if not isinstance(name, str) or name not in options:
        raise unknown(f"{place}.name", name, options)
    if name != standing:
        under = below = {}
    below.pop("name", None)
    out = overlay(options[name], under, rest, place, None if base is None else below, fit)
    return {"name": name, **out} if base is None or own or given else out


def _opened(value: Any, options: Table | None = None) -> dict[str, Any]:
    """A node of settings as one mapping: of an instance, a plug's name, a mapping, or nothing."""
    if isinstance(value, str):
        return {"name": value}
    if dataclasses.is_dataclass(value):
        name = {} if options is None else {"name": options.name_of(type(value))}
        return {**name, **{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}}
    return {} if value is None else dict(value.items())


def merge(base: Any, changes: Mapping[str, Any], key: str) -> Any:
    """`base` (a dataclass instance) with a nested mapping of changes; naming another plug replaces the old plug."""
    cls = type(base)
    touched = {saved_names(cls).get(name, name) for name in changes}
    under = {name: value for name, value in _opened(base).items() if name in touched}
    return dataclasses.replace(base, **checked(cls, overlay(cls, under, changes, key), key))


def saved_names(cls: type) -> dict[str, str]:
    """Older names of fields, which are still read and by which they are written -> the names they have now."""
    return {f.metadata["saved"]: f.name for f in dataclasses.fields(cls) if "saved" in f.metadata}


def to_dict(cfg: object, options: Table | None = None, whole: bool = False) -> Any:
    """The inverse of `build`: plain nested dicts, plugs as ``{"name": …}``; JSON-ready and hashable by content. Fields
    are written under their saved names, so that what is addressed by its content keeps its address; fields that came
    later only where they are not at their default, or with `whole`."""
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        out: dict[str, Any] = {}
        if options is not None:
            out["name"] = options.name_of(type(cfg))
        for f in dataclasses.fields(cfg):
            value, module = vars(cfg)[f.name], f.metadata.get("socket")
            if f.metadata.get("later") and not whole and value == _default(f):
                continue
            out[f.metadata.get("saved", f.name)] = to_dict(value, table(module) if module else None, whole)
        return out
    if isinstance(cfg, (list, tuple)):
        return [to_dict(c, None, whole) for c in cfg]
    return {k: to_dict(v, None, whole) for k, v in cfg.items()} if is_mapping(cfg) else cfg
