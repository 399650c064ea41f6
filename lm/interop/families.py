"""Model families of `transformers`: configuration to ``ModelConfig`` fields, and tables of tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError, unknown
from lm.interop.tensors import Table, flip, same

Hf = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """`model` maps config.json to fields of ``ModelConfig``; `table` lists tensors; `prefix` may be absent in files."""

    model: Callable[[Hf], dict[str, Any]]
    table: Table
    prefix: str
    head: str


GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def _pick(options: Mapping[str, Any], value: Any, key: str) -> Any:
    if value not in options:
        raise unknown(f"config.json {key}", value, options)
    return options[value]


def _need(hf: Hf, key: str) -> Any:
    if hf.get(key) is None:
        raise UserError(f"config.json: key {key!r} is missing")
    return hf[key]


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


# What a scaling cannot do without; the other keys of `rope` have defaults.
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def rope(hf: Hf) -> dict[str, Any]:
    """The rotary plug of ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (4)."""
    rp = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if rp and all(isinstance(v, Mapping) for v in rp.values()):
        raise UserError("config.json rope_parameters: one set per layer type is not supported; valid: one set")
    theta = _first(rp.get("rope_theta"), hf.get("rope_theta"), hf.get("rotary_emb_base"), 10000.0)
    fraction = _first(rp.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), hf.get("rotary_pct"), 1.0)
    kind = _first(rp.get("rope_type"), rp.get("type"), "default")
    original = _first(hf.get("original_max_position_embeddings"), rp.get("original_max_position_embeddings"))
    keys = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if "mrope_section" in rp or kind not in keys:
        raise unknown("config.json rope_type", "mrope" if "mrope_section" in rp else kind, keys)
    for key in NEEDED.get(kind, ()):
        if rp.get(key) is None:
            raise UserError(f"config.json rope_parameters.{key}: missing; rope_type {kind!r} needs it")
    # A null or zero beta means the default, as in transformers; a null factor is the ratio of the two lengths.
    fields = {k: rp[k] for k in keys[kind] if rp.get(k) is not None and not (k.startswith("beta") and not rp[k])}
    if kind in ("yarn", "longrope"):
        fields.setdefault("factor", None)
    if kind in ("yarn", "longrope", "llama3") and original is not None:
        fields["original"] = int(original)
    return {"name": "rope", "theta": float(theta), "fraction": float(fraction), "scaling": {"name": kind, **fields}}


def _llama_like(hf: Hf, **attention: Any) -> dict[str, Any]:
    return {
        "vocab_size": _need(hf, "vocab_size"),
        "d_model": _need(hf, "hidden_size"),
        "n_layers": _need(hf, "num_hidden_layers"),
        "n_heads": _need(hf, "num_attention_heads"),
        "n_kv_heads": hf.get("num_key_value_heads"),
        "head_dim": hf.get("head_dim"),
        "d_ff": _need(hf, "intermediate_size"),
        "max_positions": hf.get("max_position_embeddings", 2048),
        "norm": {"name": "rmsnorm", "eps": hf.get("rms_norm_eps", 1e-6)},
        "positions": rope(hf),
        "ffn": {"name": _pick(GATED, hf.get("hidden_act", "silu"), "hidden_act"), "bias": bool(hf.get("mlp_bias"))},
        "head": {"name": "linear", "tie": bool(hf.get("tie_word_embeddings", False))},
        "mixer": {"name": "softmax", **attention},
    }


def _llama(hf: Hf) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias"))
    return _llama_like(hf, qkv_bias=bias, out_bias=bias)


def _window(width: int) -> dict[str, Any]:
    return {"name": "sliding_window", "window": width}


def _mistral(hf: Hf) -> dict[str, Any]:
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, **hf}
    out = _llama_like(hf)
    if hf.get("sliding_window"):
        out["pattern"] = _window(hf["sliding_window"])
    return out


def _with_layer_types(hf: Hf, out: dict[str, Any]) -> dict[str, Any]:
    """Qwen's mixture of full and sliding layers, from ``layer_types`` or ``max_window_layers``."""
    width = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types")
    if width and not kinds:
        first = _need(hf, "max_window_layers")
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(out["n_layers"])]
    if kinds and len(kinds) != out["n_layers"]:
        raise UserError(f"config.json layer_types: {len(kinds)} found, num_hidden_layers = {out['n_layers']}")
    overrides = []
    for i, kind in enumerate(kinds or ()):
        if kind == "sliding_attention" and width:
            overrides.append({"layers": str(i), "pattern": _window(width)})
        elif kind not in ("full_attention", "sliding_attention"):
            raise unknown("config.json layer_types", kind, ("full_attention", "sliding_attention"))
    if overrides and len(overrides) == out["n_layers"]:
        return {**out, "pattern": _window(int(width or 0))}
    return {**out, "layer_overrides": overrides}


# What a key that is absent stands for in `transformers`, where the families differ. An explicit null is not absent.
QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _qwen2(hf: Hf) -> dict[str, Any]:
    hf = {**QWEN, **hf}
    return _with_layer_types(hf, _llama_like(hf, qkv_bias=True))


def _qwen3(hf: Hf) -> dict[str, Any]:
    hf = {**QWEN, **hf}
    bias = bool(hf.get("attention_bias"))
    out = _llama_like(hf, qkv_bias=bias, out_bias=bias, qk_norm=True)
    return _with_layer_types(hf, {**out, "head_dim": hf.get("head_dim") or 128})


def _mixtral(hf: Hf) -> dict[str, Any]:
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, **hf}
    if not hf.get("rope_parameters"):
        hf = {"rope_theta": 1e6, **hf}
    out = _llama_like(hf)
    router = {"k": hf.get("num_experts_per_tok", 2), "jitter": float(hf.get("router_jitter_noise") or 0.0)}
    moe = {
        "name": "moe",
        "experts": hf.get("num_local_experts", 8),
        "expert": out["ffn"]["name"],
        "load_balance_loss": hf.get("router_aux_loss_coef", 0.001),
        "router": {"name": "topk", "softmax": "after", **router},
    }
    out |= {"pattern": _window(hf["sliding_window"])} if hf.get("sliding_window") else {}
    return {**out, "ffn": moe}


def _qwen_moe(hf: Hf, out: dict[str, Any], k: int, shared: int) -> dict[str, Any]:
    """Experts in every ``decoder_sparse_step``-th layer but those of ``mlp_only_layers``."""
    moe = {
        "name": "moe",
        "experts": hf.get("num_experts") or hf.get("num_local_experts") or _need(hf, "num_experts"),
        "expert": out["ffn"]["name"],
        "d_expert": _need(hf, "moe_intermediate_size"),
        "every": hf.get("decoder_sparse_step", 1),
        "dense": out["ffn"],
        "shared": shared,
        "shared_gate": shared > 0,
        "load_balance_loss": hf.get("router_aux_loss_coef", 0.001),
        "router": {
            "name": "topk",
            "k": hf.get("num_experts_per_tok", k),
            "softmax": "after" if hf.get("norm_topk_prob") else "before",
        },
    }
    plain = [{"layers": str(i), "ffn": out["ffn"]} for i in hf.get("mlp_only_layers") or ()]
    return {**out, "ffn": moe, "layer_overrides": [*out.get("layer_overrides", ()), *plain]}


def _qwen2_moe(hf: Hf) -> dict[str, Any]:
    hf = {**QWEN, "num_key_value_heads": 16, **hf}
    if hf.get("use_sliding_window") and not hf.get("layer_types"):
        raise UserError("config.json layer_types: missing; a qwen2_moe with use_sliding_window needs it")
    out = _with_layer_types(hf, _llama_like(hf, qkv_bias=bool(hf.get("qkv_bias", True))))
    return _qwen_moe(hf, out, 4, hf.get("shared_expert_intermediate_size", 5632))


def _qwen3_moe(hf: Hf) -> dict[str, Any]:
    hf = {**QWEN, "num_key_value_heads": 4, **hf}
    bias = bool(hf.get("attention_bias"))
    out = _llama_like(hf, qkv_bias=bias, out_bias=bias, qk_norm=True)
    if hf.get("use_sliding_window") and hf.get("sliding_window"):
        out["pattern"] = _window(hf["sliding_window"])  # every layer, in this family
    return _qwen_moe(hf, out, 8, 0)


def _neox(hf: Hf) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias", True))
    rotary = rope({**hf, "rotary_pct": hf.get("rotary_pct", 0.25)})
    out = _llama_like({**hf, "hidden_act": "silu"}, qkv_bias=bias, out_bias=bias)
    return {
        **out,
        "n_kv_heads": None,
        "head_dim": None,
        "norm": {"name": "layernorm", "eps": hf.get("layer_norm_eps", 1e-5)},
        "positions": rotary,
        "ffn": {"name": _pick(PLAIN, hf.get("hidden_act", "gelu"), "hidden_act"), "bias": True},
        "parallel_residual": bool(hf.get("use_parallel_residual", True)),
    }


def _gpt2(hf: Hf) -> dict[str, Any]:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if hf.get(key):
            raise UserError(f"config.json {key}: found true; valid: false")
    width, positions = _need(hf, "n_embd"), hf.get("n_positions", 1024)
    return {
        "vocab_size": _need(hf, "vocab_size"),
        "d_model": width,
        "n_layers": _need(hf, "n_layer"),
        "n_heads": _need(hf, "n_head"),
        "d_ff": hf.get("n_inner") or 4 * width,
        "max_positions": positions,
        "norm": {"name": "layernorm", "eps": hf.get("layer_norm_epsilon", 1e-5)},
        "positions": {"name": "learned", "size": positions},
        "ffn": {"name": _pick(PLAIN, hf.get("activation_function", "gelu_new"), "activation_function"), "bias": True},
        "head": {"name": "linear", "tie": bool(hf.get("tie_word_embeddings", True))},
        "mixer": {
            "name": "softmax",
            "qkv_bias": True,
            "out_bias": True,
            "scale": 1.0 if hf.get("scale_attn_weights") is False else None,
        },
    }


def _layer(ours: str, theirs: str, turn: Any = flip) -> Table:
    return {f"{ours}/kernel": (f"{theirs}.weight", turn), f"{ours}/bias": (f"{theirs}.bias", same)}


def _norm(ours: str, theirs: str) -> Table:
    return {f"{ours}/scale": (f"{theirs}.weight", same), f"{ours}/bias": (f"{theirs}.bias", same)}


LLAMA: Table = {
    "embed": ("model.embed_tokens.weight", same),
    "final_norm/scale": ("model.norm.weight", same),
    "head/kernel": ("lm_head.weight", flip),
    **_norm("attn_norm", "model.layers.{i}.input_layernorm"),
    **_norm("ffn_norm", "model.layers.{i}.post_attention_layernorm"),
    **{k: v for n in "qkvo" for k, v in _layer(f"attn/{n}", f"model.layers.{{i}}.self_attn.{n}_proj").items()},
    **{k: v for n in "qk" for k, v in _norm(f"attn/{n}_norm", f"model.layers.{{i}}.self_attn.{n}_norm").items()},
    **{k: v for n in ("gate", "up", "down") for k, v in _layer(f"ffn/{n}", f"model.layers.{{i}}.mlp.{n}_proj").items()},
}


def _neox_part(part: int) -> Callable[..., np.ndarray]:
    """One of q, k, v out of the fused tensor, which is ordered head, part, channel."""

    def turn(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        x = x.reshape(cfg.n_heads, 3, -1, *x.shape[1:])[:, part]
        return np.moveaxis(x, -1, 0) if x.ndim == 3 else x

    return turn


NEOX: Table = {
    "embed": ("gpt_neox.embed_in.weight", same),
    "head/kernel": ("embed_out.weight", flip),
    **_norm("final_norm", "gpt_neox.final_layer_norm"),
    **_norm("attn_norm", "gpt_neox.layers.{i}.input_layernorm"),
    **_norm("ffn_norm", "gpt_neox.layers.{i}.post_attention_layernorm"),
    **{
        f"attn/{n}/{ours}": (f"gpt_neox.layers.{{i}}.attention.query_key_value.{theirs}", _neox_part(p))
        for p, n in enumerate("qkv")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    **_layer("attn/o", "gpt_neox.layers.{i}.attention.dense"),
    **_layer("ffn/up", "gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
    **_layer("ffn/down", "gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
}


def _gpt2_part(part: int) -> Callable[..., np.ndarray]:
    """One of q, k, v out of GPT-2's fused ``[in, 3 * out]``."""

    def turn(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        return np.split(x, 3, axis=-1)[part]

    return turn


GPT2: Table = {
    "embed": ("transformer.wte.weight", same),
    "pos_embed": ("transformer.wpe.weight", same),
    "head/kernel": ("lm_head.weight", flip),
    **_norm("final_norm", "transformer.ln_f"),
    **_norm("attn_norm", "transformer.h.{i}.ln_1"),
    **_norm("ffn_norm", "transformer.h.{i}.ln_2"),
    **{
        f"attn/{n}/{ours}": (f"transformer.h.{{i}}.attn.c_attn.{theirs}", _gpt2_part(p))
        for p, n in enumerate("qkv")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    **_layer("attn/o", "transformer.h.{i}.attn.c_proj", same),
    **_layer("ffn/up", "transformer.h.{i}.mlp.c_fc", same),
    **_layer("ffn/down", "transformer.h.{i}.mlp.c_proj", same),
}


def _experts(router: str, one: str, names: Mapping[str, str]) -> Table:
    """A router, and one matrix per expert."""
    return {
        "ffn/router/kernel": (f"model.layers.{{i}}.{router}.weight", flip),
        **{f"ffn/experts/{o}/kernel": (f"model.layers.{{i}}.{one}.{{e}}.{t}.weight", flip) for o, t in names.items()},
    }


MIXTRAL: Table = {
    **LLAMA,
    **_experts("block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
}
QWEN_MOE: Table = {
    **LLAMA,
    **_experts("mlp.gate", "mlp.experts", {n: f"{n}_proj" for n in ("gate", "up", "down")}),
    **{
        f"ffn/shared/{n}/kernel": (f"model.layers.{{i}}.mlp.shared_expert.{n}_proj.weight", flip)
        for n in ("gate", "up", "down")
    },
    "ffn/shared_gate/kernel": ("model.layers.{i}.mlp.shared_expert_gate.weight", flip),
}

FAMILIES = {
    "llama": Family(_llama, LLAMA, "model.", "lm_head.weight"),
    "mistral": Family(_mistral, LLAMA, "model.", "lm_head.weight"),
    "qwen2": Family(_qwen2, LLAMA, "model.", "lm_head.weight"),
    "qwen3": Family(_qwen3, LLAMA, "model.", "lm_head.weight"),
    "mixtral": Family(_mixtral, MIXTRAL, "model.", "lm_head.weight"),
    "qwen2_moe": Family(_qwen2_moe, QWEN_MOE, "model.", "lm_head.weight"),
    "qwen3_moe": Family(_qwen3_moe, QWEN_MOE, "model.", "lm_head.weight"),
    "gpt_neox": Family(_neox, NEOX, "gpt_neox.", "embed_out.weight"),
    "gpt2": Family(_gpt2, GPT2, "transformer.", "lm_head.weight"),
}
