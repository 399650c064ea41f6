"""Mixtures of experts: Mixtral, Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.config import ModelConfig
from lm.errors import UserError
from lm.ffn.moe.plug import MoE
from lm.ffn.moe.routers import TopK
from lm.interop.families.common import Family, Hf, attention_of, need, sliding_window, window_of, without
from lm.interop.families.llama import DEFAULTS as LLAMA
from lm.interop.families.llama import TABLE, read_like, write_like
from lm.interop.families.qwen import DEFAULTS, read_layer_types, read_qwen3, write_layer_types
from lm.interop.families.table import Table, flip

_MATRICES = ("gate", "up", "down")


def expert_rows(router: str, experts: str, matrices: Mapping[str, str]) -> Table:
    """A router, and the matrices of every expert: our name -> the file's."""
    layer = "model.layers.{i}"
    return {
        "ffn/router/kernel": (f"{layer}.{router}.weight", flip),
        **{f"ffn/experts/{o}/kernel": (f"{layer}.{experts}.{{e}}.{t}.weight", flip) for o, t in matrices.items()},
    }


MIXTRAL_TABLE: Table = {
    **TABLE,
    **expert_rows("block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
}
QWEN_TABLE: Table = {
    **TABLE,
    **expert_rows("mlp.gate", "mlp.experts", {n: f"{n}_proj" for n in _MATRICES}),
    **{f"ffn/shared/{n}/kernel": (f"model.layers.{{i}}.mlp.shared_expert.{n}_proj.weight", flip) for n in _MATRICES},
    "ffn/shared_gate/kernel": ("model.layers.{i}.mlp.shared_expert_gate.weight", flip),
}


# The library's balance loss sums over the k choices of a token, ours is their mean: its coefficient is k times as much
# here. It pools the tokens of all layers before it multiplies shares and probabilities, ours is a mean over layers.


def experts_of(cfg: ModelConfig) -> tuple[MoE, TopK]:
    """The model's mixture and its router; one expert, and its only choice, where it has others or none."""
    moe = cfg.ffn if isinstance(cfg.ffn, MoE) else MoE(experts=1, router=TopK(k=1), load_balance_loss=0.0)
    return moe, moe.router if isinstance(moe.router, TopK) else TopK(k=1)


def _read_mixtral(hf: Hf) -> dict[str, Any]:
    out = read_like(hf, theta=1e6)
    router = {"k": hf["num_experts_per_tok"], "jitter": float(hf["router_jitter_noise"] or 0.0)}
    moe = {
        "name": "moe",
        "experts": hf["num_local_experts"],
        "expert": out["ffn"]["name"],
        "load_balance_loss": hf["router_aux_loss_coef"] * router["k"],
        "router": {"name": "topk", "softmax": "after", **router},
    }
    out |= {"pattern": sliding_window(hf["sliding_window"])} if hf["sliding_window"] else {}
    return {**out, "ffn": moe}


def _write_mixtral(cfg: ModelConfig) -> dict[str, Any]:
    moe, router = experts_of(cfg)
    return {
        **without(write_like(cfg, "mixtral", "MixtralForCausalLM"), "mlp_bias", "attention_bias"),
        "sliding_window": window_of(cfg),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": router.k,
        "router_aux_loss_coef": moe.load_balance_loss / router.k,
        "intermediate_size": moe.d_expert or cfg.d_ff,
    }


def _read_qwen_experts(hf: Hf, out: dict[str, Any], experts: int, shared: int) -> dict[str, Any]:
    """`out` with experts in every ``decoder_sparse_step``-th layer but those of ``mlp_only_layers``; `experts` where no
    key says how many."""
    chosen, number = hf["num_experts_per_tok"], hf["num_experts"] or hf["num_local_experts"] or experts
    if hf["num_local_experts"] not in (None, number):
        found = hf["num_local_experts"]
        raise UserError(f"config.json num_local_experts: found {found} beside num_experts = {number}; valid: the same")
    moe = {
        "name": "moe",
        "experts": number,
        "expert": out["ffn"]["name"],
        "d_expert": need(hf, "moe_intermediate_size"),
        "every": hf["decoder_sparse_step"],
        "dense": out["ffn"],
        "shared": shared,
        "shared_gate": shared > 0,
        "load_balance_loss": hf["router_aux_loss_coef"] * chosen,
        "router": {
            "name": "topk",
            "k": chosen,
            "softmax": "after" if hf["norm_topk_prob"] else "before",
        },
    }
    plain = [{"layers": str(i), "ffn": out["ffn"]} for i in hf["mlp_only_layers"] or ()]
    return {**out, "ffn": moe, "layer_overrides": [*out.get("layer_overrides", ()), *plain]}


def _write_qwen_experts(cfg: ModelConfig, out: Hf) -> dict[str, Any]:
    moe, router = experts_of(cfg)
    plain = [
        i
        for i, layer in enumerate(cfg.layers())
        if type(layer.ffn) is not type(cfg.ffn) and (i + 1) % moe.every == 0  # not one that `every` leaves out
    ]
    return {
        **without(out, "mlp_bias"),
        "num_experts": moe.experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.softmax == "after",
        "moe_intermediate_size": moe.d_expert or cfg.d_ff,
        "shared_expert_intermediate_size": moe.shared,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": plain,
        "router_aux_loss_coef": moe.load_balance_loss / router.k,
    }


def _read_qwen2_moe(hf: Hf) -> dict[str, Any]:
    if hf["use_sliding_window"] and not hf["layer_types"]:  # every other one of the first layers
        slides = [i % 2 == 0 and i < need(hf, "max_window_layers") for i in range(need(hf, "num_hidden_layers"))]
        hf = {**hf, "layer_types": ["sliding_attention" if s else "full_attention" for s in slides]}
    out = read_layer_types(hf, read_like(hf, qkv_bias=bool(hf["qkv_bias"])))
    return _read_qwen_experts(hf, out, 60, hf["shared_expert_intermediate_size"])


def _write_qwen2_moe(cfg: ModelConfig) -> dict[str, Any]:
    out = without(write_like(cfg, "qwen2_moe", "Qwen2MoeForCausalLM"), "attention_bias", "head_dim")
    return {**_write_qwen_experts(cfg, out), **write_layer_types(cfg), "qkv_bias": attention_of(cfg).qkv_bias}


def _read_qwen3_moe(hf: Hf) -> dict[str, Any]:
    out = read_qwen3(hf)
    if hf["use_sliding_window"] and hf["sliding_window"]:
        out["pattern"] = sliding_window(hf["sliding_window"])  # every layer, in this family
    return _read_qwen_experts(hf, out, 128, 0)


def _write_qwen3_moe(cfg: ModelConfig) -> dict[str, Any]:
    width = window_of(cfg)
    out = write_like(cfg, "qwen3_moe", "Qwen3MoeForCausalLM")
    out = without(_write_qwen_experts(cfg, out), "shared_expert_intermediate_size")
    return {**out, "use_sliding_window": width is not None, "sliding_window": width}


_QWEN: Hf = {
    **DEFAULTS,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_experts": None,  # under either name
    "num_local_experts": None,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": None,
}
MIXTRAL = Family(
    "mixtral",
    _read_mixtral,
    _write_mixtral,
    MIXTRAL_TABLE,
    {
        **LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    },
)
QWEN2_MOE = Family(
    "qwen2_moe",
    _read_qwen2_moe,
    _write_qwen2_moe,
    QWEN_TABLE,
    {
        **_QWEN,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "qkv_bias": True,
    },
)
QWEN3_MOE = Family(
    "qwen3_moe",
    _read_qwen3_moe,
    _write_qwen3_moe,
    QWEN_TABLE,
    {
        **_QWEN,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "attention_bias": False,
    },
)
