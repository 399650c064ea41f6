"""Qwen2 and Qwen3 with plain feed-forward layers, and the windows of all Qwen models."""

from __future__ import annotations

from typing import Any

from lm.config import ModelConfig
from lm.errors import UserError, unknown
from lm.interop.families.common import Family, Hf, need, sliding_window, window_of, without
from lm.interop.families.llama import DEFAULTS as LLAMA
from lm.interop.families.llama import TABLE, read_like, write_like

KINDS = ("full_attention", "sliding_attention")
WINDOWS: Hf = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
DEFAULTS: Hf = {
    **LLAMA,
    **WINDOWS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}


def layer_kinds(hf: Hf, n_layers: int) -> list[str] | None:
    """``layer_types``, None where the file has none; `UserError` for another number of them or an unknown one."""
    kinds: list[str] | None = hf["layer_types"]
    if kinds and len(kinds) != n_layers:
        raise UserError(f"config.json layer_types: {len(kinds)} found, num_hidden_layers = {n_layers}")
    for kind in kinds or ():
        if kind not in KINDS:
            raise unknown("config.json layer_types", kind, KINDS)
    return kinds or None


def read_layer_types(hf: Hf, out: dict[str, Any]) -> dict[str, Any]:
    """`out` with Qwen's mixture of full and sliding layers, from ``layer_types`` or ``max_window_layers``."""
    width = hf["sliding_window"] if hf["use_sliding_window"] else None
    kinds = hf["layer_types"]
    if width and not kinds:
        first = need(hf, "max_window_layers")
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(out["n_layers"])]
    kinds = layer_kinds({**hf, "layer_types": kinds}, out["n_layers"]) or ()
    slides = [i for i, kind in enumerate(kinds) if kind == "sliding_attention" and width]
    overrides = [{"layers": str(i), "pattern": sliding_window(int(width or 0))} for i in slides]
    if overrides and len(overrides) == out["n_layers"]:
        return {**out, "pattern": sliding_window(int(width or 0))}
    return {**out, "layer_overrides": overrides}


def write_layer_types(cfg: ModelConfig) -> dict[str, Any]:
    windows = [window_of(layer) for layer in cfg.layers()]
    width = next((w for w in windows if w), None)
    return {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "max_window_layers": cfg.n_layers,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def write_windows(cfg: ModelConfig) -> dict[str, Any]:
    """The same for families that have no switch, and whose code asks for a width also where no layer has a window."""
    out = without(write_layer_types(cfg), "use_sliding_window", "max_window_layers")
    return {**out, "sliding_window": out["sliding_window"] or cfg.max_positions}


def _read_qwen2(hf: Hf) -> dict[str, Any]:
    return read_layer_types(hf, read_like(hf, qkv_bias=True))


def _write_qwen2(cfg: ModelConfig) -> dict[str, Any]:
    out = write_like(cfg, "qwen2", "Qwen2ForCausalLM")
    return {**without(out, "mlp_bias", "attention_bias"), **write_layer_types(cfg)}


def read_qwen3(hf: Hf) -> dict[str, Any]:
    """The fields of a Qwen3, windows aside."""
    bias = bool(hf["attention_bias"])
    return read_like(hf, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _read_qwen3(hf: Hf) -> dict[str, Any]:
    return read_layer_types(hf, {**read_qwen3(hf), "head_dim": need(hf, "head_dim")})


def _write_qwen3(cfg: ModelConfig) -> dict[str, Any]:
    return {**without(write_like(cfg, "qwen3", "Qwen3ForCausalLM"), "mlp_bias"), **write_layer_types(cfg)}


QWEN2 = Family("qwen2", _read_qwen2, _write_qwen2, TABLE, DEFAULTS)
QWEN3 = Family("qwen3", _read_qwen3, _write_qwen3, TABLE, {**DEFAULTS, "head_dim": 128, "attention_bias": False})
