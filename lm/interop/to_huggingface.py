"""Checkpoints out: a Hugging Face directory that `transformers` loads to the same logits.

What a family can say is tested by saying it and reading it back: whatever of the model's configuration does not survive
is named, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import lm.interop.families as families
import lm.model.params as params_lib
from lm.config import ModelConfig, build, to_dict
from lm.errors import UserError, unknown
from lm.interop.files import new_folder
from lm.interop.tensors import Table, flip
from lm.plug import table

Hf = dict[str, Any]
# How a model is computed, not what it computes: not part of a checkpoint.
_FREE = ("dtype", "param_dtype", "remat", "scan_layers", "init_std")
# Of a mixture of experts, what matters in training alone.
_TRAINING = (
    "capacity capacity_counts_k min_capacity priority group balance_over dispatch implementation load_balance_loss "
    "router_z_loss router.jitter"
).split()


def family_of(cfg: ModelConfig, name: str | None = None) -> tuple[str, Hf]:
    """The family that can express `cfg` and its config.json; `name` asks for one.

    Raises `UserError` naming the first setting that the family (or the nearest one) has no place for.
    """
    if name is not None and name not in families.FAMILIES:
        raise unknown("--family", name, families.FAMILIES)
    lost: dict[str, list[str]] = {}
    for family in [name] if name else _WRITE:
        hf = _WRITE[family](cfg)
        lost[family] = _differences(cfg, hf, family)
        if not lost[family]:
            return family, hf
    # A setting that every layer repeats is one.
    keys = {f: {said.split(" = ")[0].split()[-1].removeprefix("model.") for said in lost[f]} for f in lost}
    nearest = min(lost, key=lambda f: len(keys[f]))
    valid = ", ".join(families.FAMILIES)
    raise UserError(f"export: {lost[nearest][0]}, which {nearest} cannot express; valid families: {valid}")


def _differences(cfg: ModelConfig, hf: Hf, family: str) -> list[str]:
    """``model.KEY = VALUE`` of everything that config.json does not bring back."""
    try:
        back = build(ModelConfig, families.FAMILIES[family].model(json.loads(json.dumps(hf))), "model")
    except UserError as e:
        return [f"the model ({e})"]
    free = {k: getattr(cfg, k) for k in _FREE}

    def order(key: str) -> tuple[bool, str]:
        return not key.endswith(".name"), key  # another plug says more than its fields

    ours, theirs = _settings(cfg), _settings(dataclasses.replace(back, **free))
    return [
        f"model.{key} = {ours.get(key)!r}"
        for key in sorted({*ours, *theirs}, key=order)
        if ours.get(key) != theirs.get(key)
    ]


def _settings(cfg: ModelConfig) -> dict[str, Any]:
    """Everything a model computes by, flat; every layer's pattern as it is."""
    layers = [to_dict(layer) for layer in cfg.layers()]
    flat = _flat(to_dict(dataclasses.replace(cfg, layer_overrides=(), pattern=cfg.layers()[0].pattern)))
    for i, layer in enumerate(layers):
        flat |= {f"layer {i} {k}": v for k, v in _flat({"pattern": layer["pattern"], "ffn": layer["ffn"]}).items()}
    computed = ("attention.backend", "attention.block_q", "attention.block_k")
    apart = (*computed, *_FREE, *(f"ffn.{name}" for name in _TRAINING))
    out = {k: v for k, v in flat.items() if k.split()[-1] not in apart and not k.startswith("pattern")}
    if out.get("positions.trained") is None:
        out["positions.trained"] = cfg.max_positions
    return out


def _flat(tree: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= _flat(v, f"{head}{k}.") if isinstance(v, dict) else {f"{head}{k}": v}
    return out


def _inverse(options: Mapping[str, str], cfg: ModelConfig) -> str:
    """The activation's name over there; a feed-forward layer that has none comes back different, and is named then."""
    ours = getattr(cfg.ffn, "expert", None) or to_dict(cfg.ffn, table("lm.ffn"))["name"]
    return next((theirs for theirs, name in options.items() if name == ours), next(iter(options)))


def _rope(cfg: ModelConfig) -> Hf:
    positions = cfg.positions
    if not hasattr(positions, "scaling"):
        return {"rope_type": "default", "rope_theta": 10000.0}
    fields = to_dict(positions.scaling, table("lm.positions.scaling"))
    kind, original = fields.pop("name"), fields.pop("original", None)
    out = {"rope_type": kind, "rope_theta": positions.theta, **{k: v for k, v in fields.items() if v is not None}}
    if positions.fraction != 1.0:
        out["partial_rotary_factor"] = positions.fraction
    if original is not None:
        out["original_max_position_embeddings"] = original
    return out if kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3") else {"rope_type": "default"}


def _llama_like(cfg: ModelConfig, kind: str, architecture: str) -> Hf:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm.eps,
        "hidden_act": _inverse(families.GATED, cfg),
        "mlp_bias": bool(getattr(cfg.ffn, "bias", False)),
        "attention_bias": bool(cfg.mixer.out_bias),
        "tie_word_embeddings": bool(getattr(cfg.head, "tie", False)),
        "rope_parameters": _rope(cfg),
    }


def _llama(cfg: ModelConfig) -> Hf:
    return _llama_like(cfg, "llama", "LlamaForCausalLM")


def _mistral(cfg: ModelConfig) -> Hf:
    out = _llama_like(cfg, "mistral", "MistralForCausalLM")
    return {**_without(out, "mlp_bias", "attention_bias"), "sliding_window": getattr(cfg.pattern, "window", None)}


def _layer_types(cfg: ModelConfig) -> Hf:
    windows = [getattr(layer.pattern, "window", None) for layer in cfg.layers()]
    some = next((w for w in windows if w), None)
    return {
        "use_sliding_window": some is not None,
        "sliding_window": some,
        "max_window_layers": cfg.n_layers,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def _qwen2(cfg: ModelConfig) -> Hf:
    out = _llama_like(cfg, "qwen2", "Qwen2ForCausalLM")
    return {**_without(out, "mlp_bias", "attention_bias"), **_layer_types(cfg)}


def _qwen3(cfg: ModelConfig) -> Hf:
    return {**_without(_llama_like(cfg, "qwen3", "Qwen3ForCausalLM"), "mlp_bias"), **_layer_types(cfg)}


def _mixtral(cfg: ModelConfig) -> Hf:
    moe, out = cfg.ffn, _llama_like(cfg, "mixtral", "MixtralForCausalLM")
    return {
        **_without(out, "mlp_bias", "attention_bias"),
        "sliding_window": getattr(cfg.pattern, "window", None),
        "num_local_experts": getattr(moe, "experts", 1),
        "num_experts_per_tok": getattr(getattr(moe, "router", None), "k", 1),
        "router_aux_loss_coef": getattr(moe, "load_balance_loss", 0.0),
        "intermediate_size": getattr(moe, "d_expert", None) or cfg.d_ff,
    }


def _qwen_moe(cfg: ModelConfig, out: Hf) -> Hf:
    moe = cfg.ffn
    router = getattr(moe, "router", None)
    return {
        **_without(out, "mlp_bias"),
        "num_experts": getattr(moe, "experts", 1),
        "num_experts_per_tok": getattr(router, "k", 1),
        "norm_topk_prob": getattr(router, "softmax", "after") == "after",
        "moe_intermediate_size": getattr(moe, "d_expert", None) or cfg.d_ff,
        "shared_expert_intermediate_size": getattr(moe, "shared", 0),
        "decoder_sparse_step": getattr(moe, "every", 1),
        "mlp_only_layers": [
            i
            for i, layer in enumerate(cfg.layers())
            if type(layer.ffn) is not type(moe) and (i + 1) % getattr(moe, "every", 1) == 0
        ],
        "router_aux_loss_coef": getattr(moe, "load_balance_loss", 0.0),
    }


def _qwen2_moe(cfg: ModelConfig) -> Hf:
    out = _without(_llama_like(cfg, "qwen2_moe", "Qwen2MoeForCausalLM"), "attention_bias", "head_dim")
    return {**_qwen_moe(cfg, out), **_layer_types(cfg), "qkv_bias": cfg.mixer.qkv_bias}


def _qwen3_moe(cfg: ModelConfig) -> Hf:
    width = getattr(cfg.pattern, "window", None)
    out = _llama_like(cfg, "qwen3_moe", "Qwen3MoeForCausalLM")
    return {**_qwen_moe(cfg, out), "use_sliding_window": width is not None, "sliding_window": width}


def _neox(cfg: ModelConfig) -> Hf:
    rope = _rope(cfg)
    fraction = rope.get("partial_rotary_factor", 1.0)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_positions,
        "layer_norm_eps": cfg.norm.eps,
        "hidden_act": _inverse(families.PLAIN, cfg),
        "attention_bias": bool(cfg.mixer.out_bias),
        "use_parallel_residual": cfg.parallel_residual,
        "tie_word_embeddings": bool(getattr(cfg.head, "tie", False)),
        "rotary_pct": fraction,
        "rope_parameters": {**rope, "partial_rotary_factor": fraction},
    }


def _gpt2(cfg: ModelConfig) -> Hf:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": cfg.vocab_size,
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_ff,
        "n_positions": cfg.max_positions,
        "layer_norm_epsilon": cfg.norm.eps,
        "activation_function": _inverse(families.PLAIN, cfg),
        "tie_word_embeddings": bool(getattr(cfg.head, "tie", False)),
        "scale_attn_weights": cfg.mixer.scale is None,
    }


def _without(hf: Hf, *keys: str) -> Hf:
    return {k: v for k, v in hf.items() if k not in keys}


_WRITE: dict[str, Callable[[ModelConfig], Hf]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "gpt_neox": _neox,
    "gpt2": _gpt2,
}


def tensors(cfg: ModelConfig, params: Any, family: str) -> dict[str, np.ndarray]:
    """The file's tensors by name, float32 or as stored: the import's tables, backwards."""
    names: Table = families.FAMILIES[family].table
    out: dict[str, np.ndarray] = {}
    fused: dict[str, dict[int, np.ndarray]] = {}
    for place, leaf in params_lib.names(params).items():
        block, _, ours = place.partition("/")
        stacked, alone = block == "blocks", block.startswith("blocks_")
        name, turn = names[ours if stacked or alone else place]
        for i in range(cfg.n_layers) if stacked else (int(block[7:]) if alone else None,):
            value = np.asarray(leaf[i] if stacked else leaf)
            if "{e}" in name:
                for e in range(len(value)):
                    out[name.format(i=i, e=e)] = value[e].T
                continue
            if place.endswith("/kernel"):
                value = value.reshape(-1, value.shape[-1]) if "/o/" in place else value.reshape(value.shape[0], -1)
            file = name.format(i=i)
            if family in ("gpt_neox", "gpt2") and "/attn/" in place and place.split("/")[-2] in "qkv":
                fused.setdefault(file, {})["qkv".index(place.split("/")[-2])] = value
            elif place.endswith("/bias"):
                out[file] = value.reshape(-1)
            else:
                out[file] = value.T if turn is flip else value
    for file, parts in fused.items():
        out[file] = (_fuse_neox if family == "gpt_neox" else _fuse_gpt2)(cfg, [parts[i] for i in range(3)])
    return {k: np.ascontiguousarray(v) for k, v in out.items()}


def _fuse_neox(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    """Rows ordered head, part, channel: ``[H * 3 * d, D]`` or ``[H * 3 * d]``."""
    if parts[0].ndim == 2 and parts[0].shape[0] != cfg.n_heads:  # kernels [D, H * d]
        heads = [p.T.reshape(cfg.n_heads, -1, p.shape[0]) for p in parts]
        return np.stack(heads, axis=1).reshape(-1, parts[0].shape[0])
    return np.stack([p.reshape(cfg.n_heads, -1) for p in parts], axis=1).reshape(-1)


def _fuse_gpt2(cfg: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    """``[D, 3 * H * d]`` or ``[3 * H * d]``."""
    if parts[0].ndim == 2 and parts[0].shape[0] == cfg.d_model and parts[0].size > cfg.d_model:
        return np.concatenate(parts, axis=1)
    return np.concatenate([p.reshape(-1) for p in parts])


def write(
    folder: Path,
    cfg: ModelConfig,
    params: Any,
    tokenizer: Any = None,
    *,
    family: str | None = None,
    eos_id: int | None = None,
    bos_id: int | None = None,
    chat_template: str | None = None,
) -> str:
    """Writes config.json, model.safetensors, generation_config.json and the tokenizer; gives the family's name.

    The folder appears whole or not at all, and must not exist. Raises `UserError` for a model that the family cannot
    express, and for a place that cannot be written.
    """
    from safetensors.numpy import save_file

    kind, hf = family_of(cfg, family)
    end = eos_id if eos_id is not None else getattr(tokenizer, "eos_id", None)
    begin = bos_id if bos_id is not None else getattr(tokenizer, "bos_id", None)
    ids = {k: v for k, v in (("bos_token_id", begin), ("eos_token_id", end)) if v is not None}
    dtypes = {str(leaf.dtype) for leaf in params_lib.names(params).values()}
    hf |= {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32", "bos_token_id": begin, "eos_token_id": end}
    with new_folder(folder) as swap:
        _json(swap / "config.json", hf)
        _json(swap / "generation_config.json", ids)
        save_file(tensors(cfg, params, kind), str(swap / "model.safetensors"), {"format": "pt"})
        if tokenizer is not None:
            save_tokenizer(swap, tokenizer, chat_template)
    return kind


def save_tokenizer(folder: Path, tokenizer: Any, chat_template: str | None = None) -> None:
    """``tokenizer.json`` (or the SentencePiece ``tokenizer.model``) and ``tokenizer_config.json``."""
    from lm.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
    from lm.data.tokenizers.values import ValueTokenizer

    if isinstance(tokenizer, ValueTokenizer):
        return  # no format of theirs: run.json describes it
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.inner.serialized_model_proto())
        about: Hf = {"tokenizer_class": "LlamaTokenizer"}
        word = tokenizer.inner.id_to_piece
    else:
        inner = _bytes_as_bpe(tokenizer) if isinstance(tokenizer, ByteTokenizer) else tokenizer.inner
        inner.save(str(folder / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        word = inner.id_to_token
    for key, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if i is not None:
            about[key] = word(i)
    if chat_template is not None:
        about["chat_template"] = chat_template
    _json(folder / "tokenizer_config.json", about)


def _bytes_as_bpe(tokenizer: Any) -> Any:
    """Bytes are byte-level BPE without merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes, in byte order
    other = iter(range(256, 512))
    letters = {b: chr(b) if b in printable else chr(next(other)) for b in range(256)}
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: b for b, c in letters.items()}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    named = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    last = max((i for i in named if i is not None), default=255)
    inner.add_special_tokens([named.get(i, f"<unused{i}>") for i in range(256, last + 1)])  # ids follow the order
    return inner


def _json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
