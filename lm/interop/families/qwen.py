"""Qwen2 and Qwen3 with plain feed-forward layers, and the windows of all Qwen models."""

from __future__ import annotations

from typing import Any

from lm.config import ModelConfig
from lm.errors import UserError, unknown
from lm.interop.families.common import Family, Hf, need, sliding_window, window_of, without
from lm.interop.families.llama import TABLE, read_like, write_like

KINDS = ("full_attention", "sliding_attention")
# What a key that is absent stands for in `transformers`, where the families differ. An explicit null is not absent.
DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_layer_types(hf: Hf, out: dict[str, Any]) -> dict[str, Any]:
    """`out` with Qwen's mixture of full and sliding layers, from ``layer_types`` or ``max_window_layers``."""
    width = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types")
    if width and not kinds:
        first = need(hf, "max_window_layers")
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(out["n_layers"])]
    if kinds and len(kinds) != out["n_layers"]:
        raise UserError(f"config.json layer_types: {len(kinds)} found, num_hidden_layers = {out['n_layers']}")
    overrides = []
    for i, kind in enumerate(kinds or ()):
        if kind == "sliding_attention" and width:
            overrides.append({"layers": str(i), "pattern": sliding_window(width)})
        elif kind not in KINDS:
            raise unknown("config.json layer_types", kind, KINDS)
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


def _read_qwen2(hf: Hf) -> dict[str, Any]:
    hf = {**DEFAULTS, **hf}
    return read_layer_types(hf, read_like(hf, qkv_bias=True))


def _write_qwen2(cfg: ModelConfig) -> dict[str, Any]:
    out = write_like(cfg, "qwen2", "Qwen2ForCausalLM")
    return {**without(out, "mlp_bias", "attention_bias"), **write_layer_types(cfg)}


def read_qwen3(hf: Hf) -> dict[str, Any]:
    """The fields of a Qwen3, windows aside."""
    bias = bool(hf.get("attention_bias"))
    return read_like(hf, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _read_qwen3(hf: Hf) -> dict[str, Any]:
    hf = {**DEFAULTS, **hf}
    return read_layer_types(hf, {**read_qwen3(hf), "head_dim": hf.get("head_dim") or 128})


def _write_qwen3(cfg: ModelConfig) -> dict[str, Any]:
    return {**without(write_like(cfg, "qwen3", "Qwen3ForCausalLM"), "mlp_bias"), **write_layer_types(cfg)}


QWEN2 = Family(_read_qwen2, _write_qwen2, TABLE)
QWEN3 = Family(_read_qwen3, _write_qwen3, TABLE)
