"""OLMo 2: norms on what layers give, and queries and keys normalised over their whole width (arXiv 2501.00656)."""

from __future__ import annotations

from typing import Any

from lm.config import ModelConfig
from lm.interop.families.common import Family, Hf, without
from lm.interop.families.llama import DEFAULTS, TABLE, read_like, write_like
from lm.interop.families.table import norm_rows

_LAYER = "model.layers.{i}"


def _read(hf: Hf) -> dict[str, Any]:
    bias = bool(hf["attention_bias"])
    out = read_like(hf, qkv_bias=bias, out_bias=bias, qk_norm=True, qk_norm_over="width")
    return {**out, "norm_place": "output"}


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return without(write_like(cfg, "olmo2", "Olmo2ForCausalLM"), "mlp_bias")


OLMO2 = Family(
    "olmo2",
    _read,
    _write,
    {
        **TABLE,
        **norm_rows("attn_out_norm", f"{_LAYER}.post_attention_layernorm"),
        **norm_rows("ffn_out_norm", f"{_LAYER}.post_feedforward_layernorm"),
    },
    {**DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False},
)
