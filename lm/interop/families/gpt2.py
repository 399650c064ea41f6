"""GPT-2: learned positions, matrices stored with inputs first, one tensor for queries, keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError
from lm.interop.families.common import PLAIN, QKV, Family, Fused, Hf, activation, attention_of, need, pick, ties
from lm.interop.families.table import Table, Turn, flip, fused_rows, linear_rows, norm_rows, same


def _part(part: int) -> Turn:
    """One of q, k, v out of the fused ``[in, 3 * out]``."""

    def turn(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        return np.split(x, 3, axis=-1)[part]

    return turn


def _fuse(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    """``[D, 3 * H * d]`` or ``[3 * H * d]``."""
    return np.concatenate(parts, axis=-1)


_LAYER = "transformer.h.{i}"
TABLE: Table = {
    "embed": ("transformer.wte.weight", same),
    "pos_embed": ("transformer.wpe.weight", same),
    "head/kernel": ("lm_head.weight", flip),
    **norm_rows("final_norm", "transformer.ln_f"),
    **norm_rows("attn_norm", f"{_LAYER}.ln_1"),
    **norm_rows("ffn_norm", f"{_LAYER}.ln_2"),
    **fused_rows(f"{_LAYER}.attn.c_attn", _part),
    **linear_rows("attn/o", f"{_LAYER}.attn.c_proj", same),
    **linear_rows("ffn/up", f"{_LAYER}.mlp.c_fc", same),
    **linear_rows("ffn/down", f"{_LAYER}.mlp.c_proj", same),
}


def _read(hf: Hf) -> dict[str, Any]:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if hf[key]:
            raise UserError(f"config.json {key}: found true; valid: false")
    width, positions = need(hf, "n_embd"), need(hf, "n_positions")
    return {
        "vocab_size": need(hf, "vocab_size"),
        "d_model": width,
        "n_layers": need(hf, "n_layer"),
        "n_heads": need(hf, "n_head"),
        "d_ff": hf["n_inner"] or 4 * width,
        "max_positions": positions,
        "norm": {"name": "layernorm", "eps": need(hf, "layer_norm_epsilon")},
        "positions": {"name": "learned", "size": positions},
        "ffn": {"name": pick(PLAIN, hf["activation_function"], "activation_function"), "bias": True},
        "head": {"name": "linear", "tie": bool(hf["tie_word_embeddings"])},
        "mixer": {
            "name": "softmax",
            "qkv_bias": True,
            "out_bias": True,
            "scale": 1.0 if hf["scale_attn_weights"] is False else None,
        },
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": cfg.vocab_size,
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_ff,
        "n_positions": cfg.max_positions,
        "layer_norm_epsilon": cfg.norm.eps,
        "activation_function": activation(PLAIN, cfg),
        "tie_word_embeddings": ties(cfg),
        "scale_attn_weights": attention_of(cfg).scale is None,
    }


GPT2 = Family(
    "gpt2",
    _read,
    _write,
    TABLE,
    {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "transformer.",
    fused=(Fused(QKV, _fuse),),
    inputs_first=True,
)
