"""GEB-1.3B (arXiv 2406.09900): 1.3 B parameters with ChatGLM-3's vocabulary.

The sizes give the reported parameter count with the components it names; they are not checked against its weights.
"""

from __future__ import annotations

from typing import Any

POD = "v5e:8x8"  # a slice that its training step is certified for


def model() -> dict[str, Any]:
    return {
        "vocab_size": 64896,
        "d_model": 2048,
        "n_layers": 24,
        "n_heads": 16,
        "n_kv_heads": 4,
        "head_dim": 128,
        "d_ff": 5632,
        "max_positions": 4096,
        "norm": {"name": "rmsnorm", "eps": 1e-5},
        "positions": {"name": "rope", "theta": 10000.0},
        "ffn": {"name": "swiglu"},
        "head": {"name": "linear", "tie": False},
        "dtype": "bfloat16",
        "remat": True,
    }


def train() -> dict[str, Any]:
    """1 M tokens a step."""
    return {"batch": 256, "data": {"seq_len": 4096}, "mesh": {"data": 1, "fsdp": -1}}
