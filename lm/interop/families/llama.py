"""Llama and Mistral, and what Qwen and Mixtral have in common with them."""

from __future__ import annotations

from typing import Any

import lm.interop.families.rotary as rotary
from lm.config import ModelConfig
from lm.interop.families.common import (
    GATED,
    ROTARY,
    Family,
    Hf,
    activation,
    attention_of,
    ffn_bias,
    need,
    pick,
    sliding_window,
    ties,
    window_of,
    without,
)
from lm.interop.families.table import Table, flip, linear_rows, norm_rows, same

_LAYER = "model.layers.{i}"
TABLE: Table = {
    "embed": ("model.embed_tokens.weight", same),
    "final_norm/scale": ("model.norm.weight", same),
    "head/kernel": ("lm_head.weight", flip),
    **norm_rows("attn_norm", f"{_LAYER}.input_layernorm"),
    **norm_rows("ffn_norm", f"{_LAYER}.post_attention_layernorm"),
    **{k: v for n in "qkvo" for k, v in linear_rows(f"attn/{n}", f"{_LAYER}.self_attn.{n}_proj").items()},
    **{k: v for n in "qk" for k, v in norm_rows(f"attn/{n}_norm", f"{_LAYER}.self_attn.{n}_norm").items()},
    **{k: v for n in ("gate", "up", "down") for k, v in linear_rows(f"ffn/{n}", f"{_LAYER}.mlp.{n}_proj").items()},
}


# What keys stand for where they are absent; the families that are like this one say where they differ.
DEFAULTS: Hf = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    **ROTARY,
}


def read_like(hf: Hf, theta: float = 10000.0, **attention: Any) -> dict[str, Any]:
    """The fields of a Llama-like model; `theta`: the family's default; `attention`: fields of its mixer."""
    return {
        "vocab_size": need(hf, "vocab_size"),
        "d_model": need(hf, "hidden_size"),
        "n_layers": need(hf, "num_hidden_layers"),
        "n_heads": need(hf, "num_attention_heads"),
        "n_kv_heads": hf["num_key_value_heads"],
        "head_dim": hf["head_dim"],
        "d_ff": need(hf, "intermediate_size"),
        "max_positions": need(hf, "max_position_embeddings"),
        "norm": {"name": "rmsnorm", "eps": need(hf, "rms_norm_eps")},
        "positions": rotary.read(hf, theta),
        "ffn": {"name": pick(GATED, hf["hidden_act"], "hidden_act"), "bias": bool(hf.get("mlp_bias"))},
        "head": {"name": "linear", "tie": bool(hf["tie_word_embeddings"])},
        "mixer": {"name": "softmax", **attention},
    }


def write_like(cfg: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm.eps,
        "hidden_act": activation(GATED, cfg),
        "mlp_bias": ffn_bias(cfg),
        "attention_bias": attention_of(cfg).out_bias,
        "tie_word_embeddings": ties(cfg),
        **rotary.write(cfg),
    }


def _read_llama(hf: Hf) -> dict[str, Any]:
    bias = bool(hf["attention_bias"])
    return read_like(hf, qkv_bias=bias, out_bias=bias)


def _write_llama(cfg: ModelConfig) -> dict[str, Any]:
    return write_like(cfg, "llama", "LlamaForCausalLM")


def _read_mistral(hf: Hf) -> dict[str, Any]:
    out = read_like(hf)
    if hf["sliding_window"]:
        out["pattern"] = sliding_window(hf["sliding_window"])
    return out


def _write_mistral(cfg: ModelConfig) -> dict[str, Any]:
    out = write_like(cfg, "mistral", "MistralForCausalLM")
    return {**without(out, "mlp_bias", "attention_bias"), "sliding_window": window_of(cfg)}


LLAMA = Family("llama", _read_llama, _write_llama, TABLE, {**DEFAULTS, "attention_bias": False, "mlp_bias": False})
MISTRAL = Family(
    "mistral",
    _read_mistral,
    _write_mistral,
    TABLE,
    {
        **DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
