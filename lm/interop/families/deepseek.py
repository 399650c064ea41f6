"""DeepSeek-V3: latent attention, many small experts chosen by sigmoid scores and a bias, a few dense layers first
(arXiv 2412.19437)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError, shown
from lm.ffn.moe.plug import MoE
from lm.ffn.moe.routers import DeepSeekV3
from lm.interop.families.common import Family, Fused, Hf, count, need, without
from lm.interop.families.experts import expert_rows
from lm.interop.families.llama import DEFAULTS, TABLE, read_like, write_like
from lm.interop.families.table import Table, Turn, flip, linear_rows, norm_rows, same
from lm.mixers.mla import MLA

_ATTENTION = "model.layers.{i}.self_attn"
_EPS = 1e-6  # of the norms of latent vectors, whatever the model's is
_MATRICES = ("gate", "up", "down")


def _of(cfg: ModelConfig) -> tuple[MLA, MoE, DeepSeekV3]:
    """The model's mixer, mixture and router; plain ones where it has others."""
    mixer = cfg.mixer if isinstance(cfg.mixer, MLA) else MLA()
    moe = cfg.ffn if isinstance(cfg.ffn, MoE) else MoE()
    return mixer, moe, moe.router if isinstance(moe.router, DeepSeekV3) else DeepSeekV3()


# In the file a head's channels that turn come last and in pairs; here first, and pair i is (i, i + width / 2).


def _halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def _pairs(x: np.ndarray) -> np.ndarray:
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def _queries(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    heads = x.T.reshape(x.shape[1], cfg.n_heads, -1)
    still, turns = np.split(heads, [_of(cfg)[0].nope_dim], axis=-1)
    return np.concatenate([_halves(turns), still], axis=-1)


def _join_queries(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    heads = parts[0].reshape(len(parts[0]), cfg.n_heads, -1)
    turns, still = np.split(heads, [cfg.head_width], axis=-1)
    return np.concatenate([still, _pairs(turns)], axis=-1).reshape(len(heads), -1).T


def _latent(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """Keys' and values' vector and the key that turns, of a matrix or a bias."""
    latent, turns = np.split(x.T, [_of(cfg)[0].kv_rank], axis=-1)
    return np.concatenate([_halves(turns), latent], axis=-1)


def _join_latent(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    turns, latent = np.split(parts[0], [cfg.head_width], axis=-1)
    return np.concatenate([latent, _pairs(turns)], axis=-1).T


def _read_out(part: int) -> Turn:
    """What reads keys, or values, out of the vector."""

    def turn(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        heads = x.T.reshape(x.shape[1], cfg.n_heads, -1)
        return np.split(heads, [_of(cfg)[0].nope_dim], axis=-1)[part]

    return turn


def _join_read_out(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    heads = [part.reshape(len(part), cfg.n_heads, -1) for part in parts]
    return np.concatenate(heads, axis=-1).reshape(len(parts[0]), -1).T


DEEPSEEK_TABLE: Table = {
    **TABLE,
    **linear_rows("attn/q_down", f"{_ATTENTION}.q_a_proj"),
    "attn/q_norm/scale": (f"{_ATTENTION}.q_a_layernorm.weight", same),
    "attn/q_up/kernel": (f"{_ATTENTION}.q_b_proj.weight", _queries),
    "attn/q/kernel": (f"{_ATTENTION}.q_proj.weight", _queries),
    **linear_rows("attn/kv_down", f"{_ATTENTION}.kv_a_proj_with_mqa", _latent),
    "attn/kv_down/bias": (f"{_ATTENTION}.kv_a_proj_with_mqa.bias", _latent),
    **norm_rows("attn/kv_norm", f"{_ATTENTION}.kv_a_layernorm"),
    **{f"attn/{n}_up/kernel": (f"{_ATTENTION}.kv_b_proj.weight", _read_out(i)) for i, n in enumerate("kv")},
    **expert_rows("mlp.gate", "mlp.experts", {n: f"{n}_proj" for n in _MATRICES}),
    "ffn/router/bias": ("model.layers.{i}.mlp.gate.e_score_correction_bias", same),
    **{f"ffn/shared/{n}/kernel": (f"model.layers.{{i}}.mlp.shared_experts.{n}_proj.weight", flip) for n in _MATRICES},
}


def _scale(hf: Hf, width: int) -> float | None:
    """Of the logits: YaRN's temperature is in it twice, where ``mscale_all_dim`` says so."""
    rope = hf["rope_scaling"] or hf["rope_parameters"] or {}
    all_dim, kind = rope.get("mscale_all_dim"), rope.get("rope_type") or rope.get("type") or "default"
    if not all_dim or kind == "default":
        return None
    factor = float(need(rope, "factor"))
    m = 1.0 if factor <= 1 else 0.1 * all_dim * math.log(factor) + 1.0
    return float(width**-0.5 * m * m)


# Keys that may have one value alone, and that value.
_FIXED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True}


def _read(hf: Hf) -> dict[str, Any]:
    turns, still, heads = (count(hf, k) for k in ("qk_rope_head_dim", "qk_nope_head_dim", "num_attention_heads"))
    same_as = {"head_dim": turns, "qk_head_dim": turns + still, "num_key_value_heads": heads}
    same_as["num_local_experts"] = need(hf, "n_routed_experts")
    for key, value in {**_FIXED, **same_as}.items():
        if hf[key] not in (None, value):
            raise UserError(f"config.json {key}: found {shown(hf[key])}; valid: {value!r}, in this model")
    out = read_like({**hf, "head_dim": turns, "num_key_value_heads": None})
    width = count(hf, "moe_intermediate_size")
    return {
        **out,
        "mixer": {
            "name": "mla",
            "kv_rank": need(hf, "kv_lora_rank"),
            "q_rank": hf["q_lora_rank"],
            "nope_dim": still,
            "v_dim": need(hf, "v_head_dim"),
            "bias": bool(hf["attention_bias"]),
            "scale": _scale(hf, turns + still),
            "latent_eps": _EPS,
        },
        "ffn": {
            "name": "moe",
            "experts": need(hf, "n_routed_experts"),
            "expert": out["ffn"]["name"],
            "d_expert": width,
            "shared": width * (hf["n_shared_experts"] or 0),
            "first_dense": hf["first_k_dense_replace"] or 0,
            "dense": out["ffn"],
            "load_balance_loss": 0.0,
            "router": {
                "name": "deepseek_v3",
                "k": need(hf, "num_experts_per_tok"),
                "normalize": bool(hf["norm_topk_prob"]),
                "scale": float(need(hf, "routed_scaling_factor")),
                "groups": need(hf, "n_group"),
                "keep_groups": need(hf, "topk_group"),
            },
        },
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    mixer, moe, router = _of(cfg)
    width = moe.d_expert or cfg.d_ff
    return {
        **without(write_like(cfg, "deepseek_v3", "DeepseekV3ForCausalLM"), "mlp_bias"),
        "attention_bias": mixer.bias,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": cfg.head_dim,
        "v_head_dim": mixer.v_dim,
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared // width,
        "moe_intermediate_size": width,
        "first_k_dense_replace": moe.first_dense,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scale,
        "n_group": router.groups,
        "topk_group": router.keep_groups,
        **_FIXED,
    }


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    _read,
    _write,
    DEEPSEEK_TABLE,
    {
        **DEFAULTS,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "qk_head_dim": None,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        **_FIXED,
        # Of training and of layers that guess further tokens, whose tensors have no place here.
        **dict.fromkeys(("aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers")),
        "num_local_experts": None,  # another name for ``n_routed_experts`` in transformers
    },
    fused=(
        Fused(("attn/q_up",), _join_queries),
        Fused(("attn/q",), _join_queries),
        Fused(("attn/kv_down",), _join_latent),
        Fused(("attn/k_up", "attn/v_up"), _join_read_out),
    ),
)
