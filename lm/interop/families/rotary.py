"""Rotary settings: ``rope_parameters`` (transformers 5), or ``rope_scaling`` and ``rope_theta`` (transformers 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.config import ModelConfig, to_dict
from lm.errors import UserError, nearest, shown, unknown
from lm.interop.families.common import Hf
from lm.plug import table
from lm.positions.base import Positions
from lm.positions.rope import Rope

# Keys of each kind of scaling; those of `NEEDED` have no default.
KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


_KNOWN = {
    *(key for keys in KEYS.values() for key in keys),
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    "finetuned",  # of YaRN's authors: how the weights were made
}


def read(hf: Hf, theta: float = 10000.0) -> dict[str, Any]:
    """The rotary plug of a config.json, `theta` being the family's default; what stands in ``rope_scaling`` replaces
    ``rope_parameters``, as in transformers 5. Raises `UserError` for a scaling that is unknown or lacks a key."""
    rp = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if rp and all(isinstance(v, Mapping) for v in rp.values()):
        raise UserError("config.json rope_parameters: one set per layer type is not supported; valid: one set")
    theta = _first(rp.get("rope_theta"), hf.get("rope_theta"), theta)
    fraction = _first(rp.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), 1.0)
    kind = _first(rp.get("rope_type"), rp.get("type"), "default")
    if "mrope_section" in rp or kind not in KEYS:
        raise unknown("config.json rope_type", "mrope" if "mrope_section" in rp else kind, KEYS)
    for key, value in rp.items():  # of another kind of scaling, transformers passes them over
        if key not in _KNOWN and value is not None:
            raise UserError(f"config.json rope_parameters.{key}: found {shown(value)}, unknown{nearest(key, _KNOWN)}")
    for key in NEEDED.get(kind, ()):
        if rp.get(key) is None:
            raise UserError(f"config.json rope_parameters.{key}: missing; rope_type {kind!r} needs it")
    # A null or zero beta means the default, as in transformers; a null factor is the ratio of the two lengths.
    fields = {k: rp[k] for k in KEYS[kind] if rp.get(k) is not None and not (k.startswith("beta") and not rp[k])}
    if kind in ("yarn", "longrope"):
        fields.setdefault("factor", None)
    original = _first(hf.get("original_max_position_embeddings"), rp.get("original_max_position_embeddings"))
    if kind in ("yarn", "longrope", "llama3") and original is not None:
        fields["original"] = int(original)
    return {"name": "rope", "theta": float(theta), "fraction": float(fraction), "scaling": {"name": kind, **fields}}


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def write(cfg: ModelConfig, partial: bool = False) -> dict[str, Any]:
    """The rotary keys of a model: ``rope_parameters``, and beside it what transformers 4 and other readers look for.
    Those of plain rotation where they have no place for its positions. `partial`: the family's models can turn a part
    of each head."""
    return write_positions(cfg.positions, partial)


def write_positions(positions: Positions, partial: bool = False) -> dict[str, Any]:
    """`write`, of a layer's positions."""
    if not isinstance(positions, Rope):
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    fields = to_dict(positions.scaling, table("lm.positions.scaling"))
    kind, original = fields.pop("name"), fields.pop("original", None)
    if kind not in KEYS:
        return {"rope_parameters": {"rope_type": "default"}}
    out = {"rope_type": kind, "rope_theta": positions.theta, **{k: v for k, v in fields.items() if v is not None}}
    older: dict[str, Any] = {"rope_theta": positions.theta}
    if partial and positions.fraction != 1.0:
        out["partial_rotary_factor"] = older["partial_rotary_factor"] = positions.fraction
    if original is not None:
        out["original_max_position_embeddings"] = original
    if kind != "default":
        older["rope_scaling"] = {**out, "type": kind}
    return {"rope_parameters": out, **older}
