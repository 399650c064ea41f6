"""Phi-3 and Phi-4-mini: one tensor for queries, keys and values, one for gate and up, heads that turn in part."""

from __future__ import annotations

from typing import Any

import numpy as np

import lm.interop.families.rotary as rotary
from lm.config import ModelConfig
from lm.errors import unknown
from lm.interop.families.common import QKV, Family, Fused, Hf, sliding_window, window_of, without
from lm.interop.families.llama import DEFAULTS, TABLE, read_like, write_like
from lm.interop.families.table import Turn, fused_rows

KINDS = ("default", "longrope", "su", "yarn")


def _heads(part: int) -> Turn:
    """q, k or v out of rows in that order."""

    def turn(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        q, k = (n * cfg.head_width for n in (cfg.n_heads, cfg.kv_heads))
        return np.moveaxis(np.split(x, (q, q + k))[part], 0, -1)

    return turn


def _half(part: int) -> Turn:
    """gate or up."""

    def turn(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        return np.split(x, 2)[part].T

    return turn


def _join(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, axis=-1).T


def _read(hf: Hf) -> dict[str, Any]:
    scaling = dict(hf["rope_scaling"] or hf["rope_parameters"] or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in KINDS:
        raise unknown("config.json rope_type", kind, KINDS)
    if kind != "default":  # the other two are older names of it
        hf = {**hf, "rope_scaling": {**scaling, "rope_type": "longrope", "type": "longrope"}}
    out = read_like(hf)
    return {**out, "pattern": sliding_window(hf["sliding_window"])} if hf["sliding_window"] else out


def _write(cfg: ModelConfig) -> dict[str, Any]:
    rope = rotary.write(cfg, partial=True)
    original = rope["rope_parameters"].get("original_max_position_embeddings", cfg.max_positions)
    return {
        **without(write_like(cfg, "phi3", "Phi3ForCausalLM"), "mlp_bias", "attention_bias"),
        "sliding_window": window_of(cfg),
        "original_max_position_embeddings": original,
        **rope,
    }


PHI3 = Family(
    "phi3",
    _read,
    _write,
    {
        **TABLE,
        **fused_rows("model.layers.{i}.self_attn.qkv_proj", _heads),
        **{
            f"ffn/{name}/kernel": ("model.layers.{i}.mlp.gate_up_proj.weight", _half(n))
            for n, name in enumerate(("gate", "up"))
        },
    },
    {
        **DEFAULTS,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    fused=(Fused(QKV, _join), Fused(("ffn/gate", "ffn/up"), _join)),
)
