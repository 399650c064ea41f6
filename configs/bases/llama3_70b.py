"""Llama 3 70B (arXiv 2407.21783, table 3): 70,553,706,496 parameters, trained at 8,192 tokens."""

from __future__ import annotations

from typing import Any

POD = "v5p:8x8x16"  # a slice that its training step is certified for


def model() -> dict[str, Any]:
    return {
        "vocab_size": 128256,
        "d_model": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "head_dim": 128,
        "d_ff": 28672,
        "max_positions": 8192,
        "norm": {"name": "rmsnorm", "eps": 1e-5},
        "positions": {"name": "rope", "theta": 500000.0},
        "ffn": {"name": "swiglu"},
        "head": {"name": "linear", "tie": False},
        "dtype": "bfloat16",
        "remat": True,
    }


def train() -> dict[str, Any]:
    """16 M tokens a step, as in the second phase of the report's table."""
    return {"batch": 2048, "data": {"seq_len": 8192}, "mesh": {"data": 1, "fsdp": -1}}
