"""OpenMoE-34B/32E (arXiv 2402.01739): every fourth layer a mixture of 32 experts, top-2, beside a dense feed-forward.

SwiGLU as in the paper's text, so fewer parameters than with the cubic gate of its code.
"""

from __future__ import annotations

from typing import Any

POD = "v5p:8x8x8"  # a slice that its training step is certified for


def model() -> dict[str, Any]:
    return {
        "vocab_size": 256384,  # umT5's, with sentinels, filled up
        "d_model": 3072,
        "n_layers": 32,
        "n_heads": 24,
        "head_dim": 128,
        "d_ff": 12288,
        "max_positions": 2048,
        "positions": {"name": "rope", "theta": 10000.0},
        "ffn": {
            "name": "moe",
            "experts": 32,
            "router": {"name": "topk", "k": 2, "softmax": "before"},
            "d_expert": 12288,
            "shared": 12288,
            "every": 4,
            "capacity": 1.25,
            "capacity_counts_k": False,
            "min_capacity": 4,
            "group": "sequence",
            "load_balance_loss": 0.02,
            "router_z_loss": 1e-3,
        },
        "head": {"name": "linear", "tie": False},
        "dtype": "bfloat16",
        "remat": True,
    }


def train() -> dict[str, Any]:
    """Their 2,048 rows of 2,048 tokens; AdamW, where they had Adafactor."""
    return {
        "batch": 2048,
        "data": {"seq_len": 2048},
        "objective": {"name": "causal", "z_loss": 1e-4},
        "mesh": {"data": 1, "fsdp": -1, "expert": 8},
    }
