"""Keys of a config.json that no family reads: those that change no logit, the refusal of all others, and what keys say
of a model whose family is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from lm.errors import UserError, nearest, shown

# What the file says of itself and of the library that wrote it; how training and generation went; other tasks.
IDLE = frozenset(
    (
        "architectures model_type transformers_version name_or_path dtype torch_dtype auto_map tokenizer_class "
        "model_max_length transformers.js_config unsloth_version unsloth_fixed is_llama_config custom_pipelines "
        "quantization_config "
        "initializer_range initializer_factor attention_dropout hidden_dropout classifier_dropout resid_pdrop "
        "embd_pdrop attn_pdrop output_router_logits gradient_checkpointing pretraining_tp reorder_and_upcast_attn "
        "use_cache cache_implementation bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id "
        "decoder_start_token_id do_sample temperature top_k top_p typical_p repetition_penalty length_penalty "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size num_beams num_beam_groups diversity_penalty "
        "num_return_sequences early_stopping max_length min_length bad_words_ids suppress_tokens begin_suppress_tokens "
        "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty output_scores "
        "return_dict_in_generate prefix "
        "output_hidden_states output_attentions return_dict torchscript use_bfloat16 tf_legacy_loss "
        "chunk_size_feed_forward attn_implementation experts_implementation tie_encoder_decoder pruned_heads "
        "cross_attention_hidden_size is_decoder n_ctx "
        "id2label label2id num_labels problem_type finetuning_task task_specific_params summary_type summary_use_proj "
        "summary_activation summary_proj_to_labels summary_first_dropout"
    ).split()
)
# Switches of other models in the position in which they do nothing.
OFF: Mapping[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "use_sliding_window": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "use_qk_norm": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "per_layer_config": {},
}


def unread(hf: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Keys that are not `known` and may say something about the computation, in order; a null says nothing."""
    skip = {*IDLE, *known}
    return [
        key
        for key, value in hf.items()
        if value is not None and key not in skip and not key.startswith("_") and not (key in OFF and OFF[key] == value)
    ]


def refuse_unknown(hf: Mapping[str, Any], known: Iterable[str], family: str) -> None:
    """Raises `UserError` for the first key that the family does not know."""
    known = tuple(known)
    for key in unread(hf, known):
        raise UserError(
            f"config.json {key}: found {shown(hf[key])}, which the family {family!r} has no place "
            f"for{nearest(key, known)}; valid: without this key, where the weights were trained without it"
        )


# What makes another kind of model, or one with parts that no family here has: the keys that say so.
FEATURES: Mapping[str, str] = {
    "an encoder beside the decoder": "is_encoder_decoder encoder_layers encoder_ffn_dim num_decoder_layers d_kv",
    "an encoder without a decoder": "type_vocab_size",
    "images": "vision_config image_token_id image_token_index vision_start_token_id mm_tokens_per_image",
    "sound": "audio_config audio_token_id audio_token_index",
    "state-space layers (SSM)": (
        "ssm_cfg state_size d_state mamba_d_state mamba_d_conv mamba_expand mamba_n_heads ssm_state_size "
        "time_step_rank conv_kernel attn_layer_period"
    ),
    "linear attention": (
        "linear_num_key_heads linear_num_value_heads linear_conv_kernel_dim linear_attn_config attn_type_list "
        "lightning_attention"
    ),
    "recurrent layers": "lru_width attention_hidden_size block_types",
    "convolutions between layers": "conv_L_cache conv_bias",
    "latent attention (MLA)": "kv_lora_rank q_lora_rank",
    "keys chosen by an indexer": "index_topk index_n_heads",
    "multipliers of the stream": "residual_multiplier embedding_multiplier attention_multiplier scale_emb scale_depth",
    "a scale of the logits": "logit_scale logits_scaling dim_model_base",
    "clipped queries, keys and values": "clip_qkv",
    "one key head for all queries (multi_query)": "multi_query",
    "ALiBi": "alibi",
    "keys and values shared by layers": "num_kv_shared_layers",
    "parallel streams (AltUp)": "altup_num_inputs laurel_rank",
    "embeddings of each layer": "hidden_size_per_layer_input vocab_size_per_layer_input",
    "experts": (
        "num_experts num_local_experts n_routed_experts moe_num_experts moe_intermediate_size num_experts_per_tok "
        "ffn_config"
    ),
    "sliding windows": "sliding_window",
    "attention of a number of layers each": "layer_types",
}


def unknown_family(hf: Mapping[str, Any], families: Mapping[str, Iterable[str]], place: str) -> UserError:
    """The error for a ``model_type`` that is none of `families` (name -> keys that it knows): the nearest one by name
    or else by keys, and what this model has beside it. `place`: the file."""
    name, inner = hf.get("model_type"), hf.get("text_config")
    text = inner if isinstance(inner, Mapping) else {}
    own = {**text, **{k: v for k, v in hf.items() if k != "text_config"}}
    said = {key for key, value in own.items() if value is not None and value is not False and key not in IDLE}

    def alike(family: str) -> tuple[float, float]:
        spelt = difflib.SequenceMatcher(None, str(name), family).ratio()
        known = set(families[family])
        return float(spelt >= 0.75) * spelt, len(said & known) / max(len(said | known), 1)

    near = text.get("model_type") if text.get("model_type") in families else max(families, key=alike)
    known = set(families[str(near)])
    has = [what for what, words in FEATURES.items() if said & set(words.split()) and not known & set(words.split())]
    odd = [key for key in unread(own, known) if not isinstance(own[key], Mapping)]
    listed = f"{', '.join(sorted(odd)[:6])}{', …' if len(odd) > 6 else ''}"
    beyond = f"; beside it this one has {', '.join(has)}" if has else ""
    beyond += f"; keys without a place there: {listed}" if odd else ", by its keys alone"
    guess = difflib.get_close_matches(str(name), list(families), n=1, cutoff=0.75)
    meant = f" (did you mean {guess[0]!r}?)" if guess else ""
    return UserError(
        f"{place} model_type: unknown family {name!r}{meant}; nearest known: {near!r}{beyond}; valid: "
        f"{', '.join(sorted(families))}"
    )
