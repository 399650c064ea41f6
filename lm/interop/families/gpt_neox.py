"""GPT-NeoX (Pythia): layer norms, biases, and one tensor for queries, keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np

import lm.interop.families.rotary as rotary
from lm.config import ModelConfig
from lm.interop.families.common import (
    PLAIN,
    QKV,
    ROTARY,
    Family,
    Fused,
    Hf,
    activation,
    attention_of,
    need,
    pick,
    ties,
)
from lm.interop.families.llama import DEFAULTS as LLAMA
from lm.interop.families.llama import read_like
from lm.interop.families.table import Table, Turn, flip, fused_rows, linear_rows, norm_rows, same


def _part(part: int) -> Turn:
    """One of q, k, v out of the fused tensor, which is ordered head, part, channel."""

    def turn(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        x = x.reshape(cfg.n_heads, 3, -1, *x.shape[1:])[:, part]
        return np.moveaxis(x, -1, 0) if x.ndim == 3 else x

    return turn


def _fuse(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    """``[H * 3 * d, D]`` or ``[H * 3 * d]``: rows ordered head, part, channel."""
    inputs = parts[0].shape[:-1]  # (D,) for matrices [D, H * d], () for biases
    heads = [p.T.reshape(cfg.n_heads, -1, *inputs) for p in parts]
    return np.stack(heads, axis=1).reshape(-1, *inputs)


_LAYER = "gpt_neox.layers.{i}"
TABLE: Table = {
    "embed": ("gpt_neox.embed_in.weight", same),
    "head/kernel": ("embed_out.weight", flip),
    **norm_rows("final_norm", "gpt_neox.final_layer_norm"),
    **norm_rows("attn_norm", f"{_LAYER}.input_layernorm"),
    **norm_rows("ffn_norm", f"{_LAYER}.post_attention_layernorm"),
    **fused_rows(f"{_LAYER}.attention.query_key_value", _part),
    **linear_rows("attn/o", f"{_LAYER}.attention.dense"),
    **linear_rows("ffn/up", f"{_LAYER}.mlp.dense_h_to_4h"),
    **linear_rows("ffn/down", f"{_LAYER}.mlp.dense_4h_to_h"),
}


def _read(hf: Hf) -> dict[str, Any]:
    bias = bool(hf["attention_bias"])
    own = {"rope_theta": hf["rotary_emb_base"], "partial_rotary_factor": hf["rotary_pct"]}
    positions = rotary.read({**hf, **own})  # this family reads no other names
    out = read_like({**LLAMA, **hf, "hidden_act": "silu"}, qkv_bias=bias, out_bias=bias)
    return {
        **out,
        "n_kv_heads": None,
        "head_dim": None,
        "norm": {"name": "layernorm", "eps": need(hf, "layer_norm_eps")},
        "positions": positions,
        "ffn": {"name": pick(PLAIN, hf["hidden_act"], "hidden_act"), "bias": True},
        "parallel_residual": bool(hf["use_parallel_residual"]),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    rope = rotary.write(cfg, partial=True)
    fraction = rope.get("partial_rotary_factor", 1.0)
    theta = rope["rope_parameters"].get("rope_theta", 10000.0)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_positions,
        "layer_norm_eps": cfg.norm.eps,
        "hidden_act": activation(PLAIN, cfg),
        "attention_bias": attention_of(cfg).out_bias,
        "use_parallel_residual": cfg.parallel_residual,
        "tie_word_embeddings": ties(cfg),
        "rotary_pct": fraction,
        "rotary_emb_base": theta,
        **rope,
        "rope_parameters": {**rope["rope_parameters"], "partial_rotary_factor": fraction},
    }


GPT_NEOX = Family(
    "gpt_neox",
    _read,
    _write,
    TABLE,
    {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": None,
        **ROTARY,
    },
    "gpt_neox.",
    "embed_out.weight",
    (Fused(QKV, _fuse),),
)
