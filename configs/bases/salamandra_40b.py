"""Salamandra 40B (arXiv 2502.08489), trained at 4,096 and 8,192 tokens, with the feed-forward width of its model card.

The report's norms scale by ``1 + w`` (w starts at 0), which is the same function as this library's scale of ``1 + w``.
"""

from __future__ import annotations

from typing import Any

POD = "v5p:8x8x8"  # a slice that its training step is certified for


def model() -> dict[str, Any]:
    return {
        "vocab_size": 256000,
        "d_model": 8192,
        "n_layers": 48,
        "n_heads": 64,
        "n_kv_heads": 8,
        "head_dim": 128,
        "d_ff": 24576,
        "max_positions": 8192,
        "norm": {"name": "rmsnorm", "eps": 1e-5},
        "positions": {"name": "rope", "theta": 10000.0},
        "ffn": {"name": "swiglu"},
        "head": {"name": "linear", "tie": False},
        "dtype": "bfloat16",
        "remat": True,
    }


def train() -> dict[str, Any]:
    """4 M tokens a step of 8,192 tokens."""
    return {"batch": 512, "data": {"seq_len": 8192}, "mesh": {"data": 1, "fsdp": -1}}
