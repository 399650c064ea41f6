"""Megatron-Turing NLG 530B (arXiv 2201.11990): 105 layers of width 20,480, 128 heads, 2,048 positions.

A replica of the paper is 280 devices, 8 of tensor parallelism in each of 35 stages of three layers, and it trains 8, 10
or 12 replicas on batches of 1,920 rows: `mt_nlg_530b_pipeline`. Here 8 replicas of 320 chips cut everything over `fsdp`
and `tensor`, without stages.
"""

from __future__ import annotations

from typing import Any

POD = "v5p:8x16x20"  # a slice that its training step is certified for


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
        "mixer": {"name": "softmax", "qkv_bias": True, "out_bias": True},
        "positions": {"name": "learned", "size": 2048},
        "ffn": {"name": "gelu_tanh", "bias": True},
        "head": {"name": "linear", "tie": True},
        "init_std": 0.004,
        "dtype": "bfloat16",
        "remat": True,
    }


def train() -> dict[str, Any]:
    """The paper's batch, one row per chip and part."""
    return {
        "batch": 1920,
        "accumulate": 6,
        "mesh": {"data": -1, "fsdp": 40, "tensor": 8},
        "data": {"seq_len": 2048},
        "optimizer": {"name": "adamw", "learning_rate": 5e-5, "weight_decay": 0.1, "b2": 0.95},
        "clip": 1.0,
    }
