"""gpt-oss: a logit per head beside the softmax, experts of a clamped SwiGLU with biases (arXiv 2508.10925)."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm.config import ModelConfig
from lm.ffn.glu import ClampedSwiGLU
from lm.interop.families.common import Family, Fused, Hf, need, pick, sliding_window, without
from lm.interop.families.experts import experts_of
from lm.interop.families.llama import DEFAULTS, TABLE, read_like, write_like
from lm.interop.families.qwen import layer_kinds, write_windows
from lm.interop.families.table import Turn, flip, same

_LAYER = "model.layers.{i}"
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _every_other(part: int) -> Turn:
    """gate or up, which take turns along the last axis."""

    def turn(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        return x[..., part::2]

    return turn


def _interleave(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    return np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)


def _read(hf: Hf) -> dict[str, Any]:
    bias, n, k = bool(hf["attention_bias"]), need(hf, "num_hidden_layers"), need(hf, "num_experts_per_tok")
    pick({"silu": "", "swish": ""}, hf["hidden_act"], "hidden_act")  # what the clamped one is a form of
    if not hf["rope_parameters"] and not hf["rope_scaling"]:
        hf = {**hf, "rope_parameters": _YARN}
    out = read_like(hf, 150000.0, qkv_bias=bias, out_bias=bias, sink_logits=True)
    kinds = layer_kinds(hf, n) or ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
    width = hf["sliding_window"]
    windows = [i for i, kind in enumerate(kinds) if kind == "sliding_attention" and width]
    experts = {"bias": True, "alpha": float(hf["swiglu_alpha"]), "limit": float(hf["swiglu_limit"])}
    return {
        **out,
        "ffn": {
            "name": "moe",
            "experts": need(hf, "num_local_experts"),
            "expert": "clamped_swiglu",
            "expert_settings": experts,
            "load_balance_loss": hf["router_aux_loss_coef"] * k,
            "router": {"name": "topk", "k": k, "softmax": "after", "offset": True},
        },
        "layer_overrides": [{"layers": str(i), "pattern": sliding_window(width)} for i in windows],
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    moe, router = experts_of(cfg)
    kind = moe.kind if isinstance(moe.kind, ClampedSwiGLU) else ClampedSwiGLU()
    return {
        **without(write_like(cfg, "gpt_oss", "GptOssForCausalLM"), "mlp_bias"),
        **write_windows(cfg),
        "hidden_act": "silu",
        "num_local_experts": moe.experts,
        "num_experts_per_tok": router.k,
        "router_aux_loss_coef": moe.load_balance_loss / router.k,
        "intermediate_size": moe.d_expert or cfg.d_ff,
        "swiglu_alpha": kind.alpha,
        "swiglu_limit": kind.limit,
    }


_EXPERTS = f"{_LAYER}.mlp.experts"
GPT_OSS = Family(
    "gpt_oss",
    _read,
    _write,
    {
        **TABLE,
        "attn/sinks": (f"{_LAYER}.self_attn.sinks", same),
        "ffn/router/kernel": (f"{_LAYER}.mlp.router.weight", flip),
        "ffn/router/offset": (f"{_LAYER}.mlp.router.bias", same),
        **{
            f"ffn/experts/{name}/{ours}": (f"{_EXPERTS}.gate_up_proj{theirs}", _every_other(n))
            for n, name in enumerate(("gate", "up"))
            for ours, theirs in (("kernel", ""), ("bias", "_bias"))
        },
        "ffn/experts/down/kernel": (f"{_EXPERTS}.down_proj", same),
        "ffn/experts/down/bias": (f"{_EXPERTS}.down_proj_bias", same),
    },
    {
        **DEFAULTS,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "layer_types": None,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        # What the model's own code calls two of the above; nobody reads them here or in transformers.
        "experts_per_token": None,
        "initial_context_length": None,
    },
    fused=(Fused(("ffn/experts/gate", "ffn/experts/up"), _interleave),),
)
