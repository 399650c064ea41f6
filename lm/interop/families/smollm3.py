"""SmolLM3: some layers do not turn queries and keys at all (arXiv 2501.18795)."""

from __future__ import annotations

from typing import Any

from lm.config import ModelConfig
from lm.errors import UserError
from lm.interop.families.common import Family, Hf, count, need
from lm.interop.families.llama import DEFAULTS, TABLE, read_like, write_like
from lm.interop.families.qwen import WINDOWS, read_layer_types, write_layer_types
from lm.positions.nope import NoPE


def _read(hf: Hf) -> dict[str, Any]:
    bias, n = bool(hf["attention_bias"]), need(hf, "num_hidden_layers")
    turns = hf["no_rope_layers"]  # 1 where queries and keys turn
    if turns is None:
        every = count(hf, "no_rope_layer_interval")
        turns = [int((i + 1) % every != 0) for i in range(n)]
    if len(turns) < n:
        raise UserError(f"config.json no_rope_layers: {len(turns)} found, num_hidden_layers = {n}")
    kinds = hf["layer_types"] or [_kind(bool(hf["use_sliding_window"]) and not turn) for turn in turns[:n]]
    out = read_like(hf, 2e6, qkv_bias=bias, out_bias=bias)
    out = read_layer_types({**hf, "layer_types": kinds}, out)
    still = [{"layers": str(i), "positions": {"name": "nope"}} for i, turn in enumerate(turns[:n]) if not turn]
    return {**out, "layer_overrides": [*out.get("layer_overrides", ()), *still]}


def _kind(slides: bool) -> str:
    return "sliding_attention" if slides else "full_attention"


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_like(cfg, "smollm3", "SmolLM3ForCausalLM"),
        **write_layer_types(cfg),
        "no_rope_layers": [int(not isinstance(layer.positions, NoPE)) for layer in cfg.layers()],
    }


SMOLLM3 = Family(
    "smollm3",
    _read,
    _write,
    TABLE,
    {
        **DEFAULTS,
        **WINDOWS,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
)
