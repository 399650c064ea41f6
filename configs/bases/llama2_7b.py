"""Llama 2 7B (arXiv 2307.09288): 6,738,415,616 parameters, trained at 4,096 tokens."""

from __future__ import annotations

from typing import Any

POD = "v5e:16x16"  # a slice that its training step is certified for


def model() -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "head_dim": 128,
        "d_ff": 11008,
        "max_positions": 4096,
        "norm": {"name": "rmsnorm", "eps": 1e-5},
        "positions": {"name": "rope", "theta": 10000.0},
        "ffn": {"name": "swiglu"},
        "head": {"name": "linear", "tie": False},
        "dtype": "bfloat16",
        "remat": True,
    }


def train() -> dict[str, Any]:
    """4 M tokens a step."""
    return {"batch": 1024, "data": {"seq_len": 4096}, "accumulate": 2, "mesh": {"data": 1, "fsdp": -1}}
