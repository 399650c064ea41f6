"""Mixtral 8x7B (arXiv 2401.04088): 46,702,792,704 parameters, of which a token passes 12.9 B."""

from __future__ import annotations

from typing import Any

POD = "v5p:4x8x8"  # a slice that its training step is certified for


def model() -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 128,
        "d_ff": 14336,
        "max_positions": 32768,
        "norm": {"name": "rmsnorm", "eps": 1e-5},
        "positions": {"name": "rope", "theta": 1000000.0},
        "ffn": {"name": "moe", "experts": 8, "router": {"name": "topk", "k": 2}, "load_balance_loss": 0.02},
        "head": {"name": "linear", "tie": False},
        "dtype": "bfloat16",
        "remat": True,
    }


def train() -> dict[str, Any]:
    """4 M tokens a step; the report says nothing of its training."""
    return {"batch": 512, "data": {"seq_len": 8192}, "mesh": {"data": 1, "fsdp": -1, "expert": 8, "exchange": 2.0}}
