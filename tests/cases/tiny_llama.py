"""A tiny Llama as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HF = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def write(
    folder: Path, change: Callable[[dict[str, Any]], None] = lambda tensors: None, rows: int = 258, **config: Any
) -> None:
    """Weights and config.json, without a tokenizer; ``change(tensors)`` may spoil them first."""
    shapes = {"embed_tokens": (rows, 8), "norm": (8,)}
    layer = {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    layer |= {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8)}
    layer |= {"self_attn.o_proj": (8, 8), "mlp.gate_proj": (8, 8), "mlp.up_proj": (8, 8), "mlp.down_proj": (8, 8)}
    shapes |= {f"layers.0.{k}": v for k, v in layer.items()}
    rng = np.random.default_rng(0)
    tensors = {f"model.{k}.weight": rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**HF, **config}))
