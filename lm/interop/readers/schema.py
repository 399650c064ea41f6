"""The type of every key of a config.json that a family reads, checked before the family reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm.errors import UserError, shown

Kind = Callable[[object], bool]


def _integer(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(x: object) -> bool:
    return _integer(x) or (isinstance(x, float) and math.isfinite(x))


def epsilon(x: object) -> bool:
    """What a norm can add to a mean square."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < 1


def _list(of: Kind) -> Kind:
    return lambda x: isinstance(x, list) and all(of(item) for item in x)


def _text(x: object) -> bool:
    return isinstance(x, str)


KINDS: dict[str, Kind] = {
    "an integer": _integer,
    "a number": _number,
    "a number from 0 to 1": epsilon,
    "true or false": lambda x: isinstance(x, bool),
    "a string": _text,
    "a list of strings": _list(_text),
    "a list of numbers": _list(_number),
    "a list of integers": _list(_integer),
    "an integer or a list of integers": lambda x: _integer(x) or _list(_integer)(x),
    "an object": lambda x: isinstance(x, dict),
}
TOP = {
    "an integer": (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size head_dim "
        "max_position_embeddings original_max_position_embeddings sliding_window max_window_layers "
        "n_embd n_layer n_head n_positions n_inner bos_token_id num_local_experts num_experts num_experts_per_tok "
        "moe_intermediate_size shared_expert_intermediate_size decoder_sparse_step "
        "no_rope_layer_interval sliding_window_pattern q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim "
        "qk_head_dim v_head_dim n_routed_experts n_shared_experts first_k_dense_replace n_group topk_group "
        "moe_layer_freq"
    ),
    "a number": (
        "rope_theta rotary_emb_base rotary_pct partial_rotary_factor "
        "router_aux_loss_coef router_jitter_noise query_pre_attn_scalar final_logit_softcapping "
        "attn_logit_softcapping rope_local_base_freq swiglu_alpha swiglu_limit routed_scaling_factor"
    ),
    "a number from 0 to 1": "rms_norm_eps layer_norm_eps layer_norm_epsilon",
    "true or false": (
        "tie_word_embeddings attention_bias mlp_bias use_sliding_window use_parallel_residual scale_attn_weights "
        "scale_attn_by_inverse_layer_idx add_cross_attention norm_topk_prob qkv_bias "
        "use_bidirectional_attention rope_interleave"
    ),
    "a string": "model_type hidden_act hidden_activation activation_function scoring_func topk_method",
    "a list of strings": "layer_types",
    "a list of integers": "mlp_only_layers no_rope_layers",
    "an integer or a list of integers": "eos_token_id",
    "an object": "rope_parameters rope_scaling",
}
ROPE = {
    "a number": (
        "rope_theta factor partial_rotary_factor original_max_position_embeddings attention_factor mscale "
        "mscale_all_dim beta_fast beta_slow low_freq_factor high_freq_factor"
    ),
    "true or false": "truncate",
    "a string": "rope_type type",
    "a list of numbers": "short_factor long_factor",
}


def check(hf: Mapping[str, Any], file: Path) -> None:
    """Raises `UserError` naming file and key when a value has another type than the key's; null is always allowed."""
    _check(hf, TOP, str(file))
    for name in ("rope_parameters", "rope_scaling"):
        found = hf.get(name) or {}
        _check(found, ROPE, f"{file} {name}")
        for kind, own in found.items():  # a set for each kind of layer
            if isinstance(own, Mapping):
                _check(own, ROPE, f"{file} {name} {kind}")


def _check(given: Mapping[str, Any], wanted: Mapping[str, str], place: str) -> None:
    for kind, keys in wanted.items():
        for key in keys.split():
            value = given.get(key)
            if value is not None and not KINDS[kind](value):
                raise UserError(f"{place} {key}: expected {kind}, found {shown(value)}")
