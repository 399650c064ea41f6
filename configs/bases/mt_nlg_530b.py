"""Megatron-Turing NLG 530B (arXiv 2201.11990): 105 layers of width 20,480, 128 heads, 2,048 positions."""

from __future__ import annotations

from typing import Any

POD = "v5p:16x16x16"  # a slice that its training step is certified for


def model() -> dict[str, Any]:
    return {
        "vocab_size": 51200,  # GPT-2's 50,257, filled up to a multiple of 128 x 8 as Megatron does
        "d_model": 20480,
        "n_layers": 105,
        "n_heads": 128,
        "head_dim": 160,
        "d_ff": 81920,
        "max_positions": 2048,
        "norm": {"name": "layernorm", "eps": 1e-5},
        "attention": {"name": "softmax", "qkv_bias": True, "out_bias": True},
        "positions": {"name": "learned", "size": 2048},
        "ffn": {"name": "gelu_tanh", "bias": True},
        "head": {"name": "linear", "tie": True},
        "init_std": 0.004,
        "dtype": "bfloat16",
        "remat": True,
    }


def train() -> dict[str, Any]:
    """Their 1,920 rows of 2,048 tokens, filled up to a multiple of the 512 devices that share rows."""
    return {"batch": 2048, "data": {"seq_len": 2048}, "mesh": {"data": 1, "fsdp": -1, "tensor": 8}}
