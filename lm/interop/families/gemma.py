"""Gemma 2 and the text model of Gemma 3: scaled embeddings, norms on both sides of layers whose weights are what a
scale is more than 1, windows in some layers (arXiv 2408.00118, 2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lm.interop.families.rotary as rotary
from lm.config import ModelConfig
from lm.errors import UserError, shown
from lm.heads.linear import Linear
from lm.interop.families.common import (
    GATED,
    Family,
    Hf,
    activation,
    attention_of,
    count,
    need,
    sliding_window,
    window_of,
    without,
)
from lm.interop.families.llama import DEFAULTS, TABLE, read_like, write_like
from lm.interop.families.qwen import layer_kinds, write_windows
from lm.interop.families.table import norm_rows

FULL, SLIDING = "full_attention", "sliding_attention"
_LAYER = "model.layers.{i}"
GEMMA_TABLE = {
    **TABLE,
    **norm_rows("attn_out_norm", f"{_LAYER}.post_attention_layernorm"),
    **norm_rows("ffn_norm", f"{_LAYER}.pre_feedforward_layernorm"),
    **norm_rows("ffn_out_norm", f"{_LAYER}.post_feedforward_layernorm"),
}


def _read(hf: Hf, kinds: list[str], rope: Hf, **attention: Any) -> dict[str, Any]:
    """What both have in common; `kinds` of layers, `rope` of the model."""
    if hf["use_bidirectional_attention"]:
        raise UserError("config.json use_bidirectional_attention: found true; valid: false")
    if hf["hidden_act"] not in (None, hf["hidden_activation"]):
        raise UserError(
            f"config.json hidden_act: found {shown(hf['hidden_act'])} beside hidden_activation = "
            f"{hf['hidden_activation']!r}, which is what counts; valid: the same, or none"
        )
    bias, scalar = bool(hf["attention_bias"]), count(hf, "query_pre_attn_scalar")
    scale = None if scalar == hf["head_dim"] else float(scalar) ** -0.5
    act = need(hf, "hidden_activation")
    out = read_like({**hf, **rope, "hidden_act": act}, qkv_bias=bias, out_bias=bias, scale=scale, **attention)
    width, slides = hf["sliding_window"], [kind == SLIDING for kind in kinds]
    windows = [{"layers": str(i), "pattern": sliding_window(width)} for i, s in enumerate(slides) if s and width]
    return {
        **out,
        "norm": {**out["norm"], "unit_offset": True},
        "norm_place": "both",
        "embed_scale": float(out["d_model"]) ** 0.5,
        "head": {**out["head"], "softcap": hf["final_logit_softcapping"]},
        "layer_overrides": windows,
    }


def _write(cfg: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    mixer, head = attention_of(cfg), cfg.head
    return {
        **without(write_like(cfg, model_type, architecture), "mlp_bias", "hidden_act"),
        **write_windows(cfg),
        "hidden_activation": activation(GATED, cfg),
        "query_pre_attn_scalar": round(mixer.scale**-2) if mixer.scale else cfg.head_dim,
        "final_logit_softcapping": head.softcap if isinstance(head, Linear) else None,
        "attn_logit_softcapping": mixer.softcap,
    }


def _read_gemma2(hf: Hf) -> dict[str, Any]:
    n = need(hf, "num_hidden_layers")
    kinds = layer_kinds(hf, n) or [FULL if i % 2 else SLIDING for i in range(n)]
    return _read(hf, kinds, {}, softcap=hf["attn_logit_softcapping"])


def _write_gemma2(cfg: ModelConfig) -> dict[str, Any]:
    return _write(cfg, "gemma2", "Gemma2ForCausalLM")


def _read_gemma3(hf: Hf) -> dict[str, Any]:
    if hf["attn_logit_softcapping"] is not None:  # transformers reads the key and computes without it
        raise UserError(
            f"config.json attn_logit_softcapping: found {hf['attn_logit_softcapping']}; valid: null, Gemma 3 has none"
        )
    n = need(hf, "num_hidden_layers")
    every = count(hf, "sliding_window_pattern")
    kinds = layer_kinds(hf, n) or [SLIDING if (i + 1) % every else FULL for i in range(n)]
    found = _rotary(hf)
    out = _read(hf, kinds, {**dict.fromkeys(_ROTARY), "rope_parameters": found[FULL]}, qk_norm=True)
    local = rotary.read({**hf, **dict.fromkeys(_ROTARY), "rope_parameters": found[SLIDING]})
    turned = [{"layers": str(i), "positions": local} for i, kind in enumerate(kinds) if kind == SLIDING]
    return {**out, "layer_overrides": [*out["layer_overrides"], *turned]}


_ROTARY = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
_BASES = {FULL: 1e6, SLIDING: 1e4}


def _rotary(hf: Hf) -> dict[str, dict[str, Any]]:
    """Rotary settings by kind of layer; older files have a base of each and scale full layers alone."""
    given = dict(hf["rope_parameters"] or {})
    if any(kind not in _BASES or not isinstance(v, (Mapping, type(None))) for kind, v in given.items()):
        raise UserError(
            f"config.json rope_parameters: found {', '.join(sorted(given))}; valid: one each for {FULL} and {SLIDING}"
        )
    out = {kind: dict(given.get(kind) or {}) for kind in _BASES}
    out[FULL] |= hf["rope_scaling"] or {}
    for kind, older in ((FULL, hf["rope_theta"]), (SLIDING, hf["rope_local_base_freq"])):
        out[kind].setdefault("rope_theta", _BASES[kind] if older is None else older)
    return out


def _write_gemma3(cfg: ModelConfig) -> dict[str, Any]:
    layers = cfg.layers()
    local = next((layer.positions for layer in layers if window_of(layer)), None)
    whole = next((layer.positions for layer in layers if not window_of(layer)), cfg.positions)
    rope = {FULL: rotary.write_positions(whole)["rope_parameters"]}
    rope[SLIDING] = {"rope_type": "default", "rope_theta": 1e4}
    if local is not None:
        rope[SLIDING] = rotary.write_positions(local)["rope_parameters"]
    out = without(_write(cfg, "gemma3_text", "Gemma3ForCausalLM"), "rope_theta", "rope_scaling")
    return {**out, "rope_parameters": rope}


_GEMMA: Hf = {
    **DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "use_bidirectional_attention": None,
}
GEMMA2 = Family(
    "gemma2",
    _read_gemma2,
    _write_gemma2,
    GEMMA_TABLE,
    {
        **_GEMMA,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
)
GEMMA3 = Family(
    "gemma3_text",
    _read_gemma3,
    _write_gemma3,
    GEMMA_TABLE,
    {
        **_GEMMA,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": None,
    },
)
