"""Small Llamas trained from scratch here, by scale: the model, and how it is trained."""

from __future__ import annotations

from typing import Any


def model(scale: str) -> dict[str, Any]:
    """The model at ``smoke`` (38 k parameters), ``study`` (0.7 M), ``laptop`` (5.8 M) or ``gpu`` (124 M)."""
    models: dict[str, dict[str, Any]] = {
        "smoke": {
            "vocab_size": 300,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "d_ff": 64,
            "max_positions": 64,
        },
        "study": {"vocab_size": 1024, "d_model": 96, "n_layers": 4, "n_heads": 4, "d_ff": 256, "max_positions": 128},
        "laptop": {"vocab_size": 4096, "d_model": 256, "n_layers": 6, "n_heads": 8, "d_ff": 688, "max_positions": 256},
        "gpu": {
            "vocab_size": 16384,
            "d_model": 768,
            "n_layers": 14,
            "n_heads": 12,
            "n_kv_heads": 4,
            "d_ff": 2048,
            "max_positions": 1024,
            "dtype": "bfloat16",
            "remat": True,
        },
    }
    return models[scale]


def train(scale: str) -> dict[str, Any]:
    """Training settings for `model` of the same scale."""
    settings: dict[str, dict[str, Any]] = {
        "smoke": {
            "steps": 6,
            "batch": 8,
            "eval_every": 3,
            "eval_rows": 8,
            "final_rows": 16,
            "save_every": 3,
            "data": {
                "texts": ("kjv:Genesis", "kjv:Ruth", "kjv:Jude"),
                "tokenizer": "bpe:300",
                "seq_len": 64,
                "held_out": 0.3,
            },
            "optimizer": {"name": "adamw", "learning_rate": 3e-3},
        },
        "study": {
            "steps": 600,
            "batch": 16,
            "eval_every": 100,
            "save_every": 200,
            "data": {"texts": ("kjv",), "tokenizer": "bpe:1024", "seq_len": 128, "held_out": 0.05},
        },
        "laptop": {
            "steps": 300,
            "batch": 16,
            "eval_every": 50,
            "save_every": 100,
            "data": {"texts": ("kjv",), "tokenizer": "bpe:4096", "seq_len": 256, "held_out": 0.05},
            "optimizer": {"name": "adamw", "learning_rate": 2e-3},
        },
        "gpu": {
            "steps": 4000,
            "batch": 64,
            "eval_every": 250,
            "save_every": 1000,
            "data": {
                "texts": ("wikipedia", "python-source", "kjv"),
                "tokenizer": "bpe:16384",
                "seq_len": 1024,
                "held_out": 0.05,
            },
            "optimizer": {"name": "adamw", "learning_rate": 6e-4},
        },
    }
    return settings[scale]
