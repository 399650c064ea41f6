"""Broken Hugging Face directories: one line that names file and tensor. Needs no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm import interop
from lm.errors import UserError
from lm.interop.readers import schema

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "tie_word_embeddings": True,
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.norm.weight": (8,),
    **{f"model.layers.0.self_attn.{n}_proj.weight": (8, 8) for n in "qkvo"},
    **{f"model.layers.0.mlp.{n}_proj.weight": (12, 8) for n in ("gate", "up")},
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
}


def _make(folder: Path, config: dict[str, Any] | None = None, drop: str = "", **shapes: tuple[int, ...]) -> Path:
    rng = np.random.default_rng(0)
    tensors = {k: rng.normal(size=s).astype(np.float32) for k, s in {**SHAPES, **shapes}.items() if k != drop}
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    return folder


def _refused(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        interop.load(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_whole_directory_loads(tmp_path: Path) -> None:
    checkpoint = interop.load(str(_make(tmp_path)))
    assert checkpoint.params["blocks"]["attn"]["q"]["kernel"].shape == (1, 8, 2, 4)
    assert checkpoint.tokenizer is None


def test_overrides_keep_the_parameters(tmp_path: Path) -> None:
    pattern = {"name": "sliding_window", "window": 3}
    checkpoint = interop.load(str(_make(tmp_path)), overrides={"pattern": pattern})
    assert checkpoint.config.pattern.window == 3
    plain = interop.load(str(tmp_path))
    np.testing.assert_array_equal(checkpoint.params["embed"], plain.params["embed"])
    assert checkpoint.identity == plain.identity


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"d_ff": 5}, "blocks/ffn/"),
        ({"n_layers": 2}, "blocks/attn"),
        ({"head": {"tie": False}}, "head/kernel"),
        ({"mixer": {"qk_norm": True}}, "blocks/attn/k_norm/scale"),
        ({"positions": {"name": "learned", "size": 8}}, "pos_embed"),
    ],
)
def test_overrides_that_ask_for_other_parameters(tmp_path: Path, overrides: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"overrides of .*{name}"):
        interop.load(str(_make(tmp_path)), overrides=overrides)


def test_files_beside_the_model_are_not_its_shards(tmp_path: Path) -> None:
    save_file({"layers.0.attention.wq": np.ones(3, np.float32)}, str(_make(tmp_path) / "consolidated.safetensors"))
    interop.load(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")  # shards without an index: all are read
    assert "wq" in _refused(tmp_path)


@pytest.mark.parametrize("keep", [4, 40, 500, -8])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    file = _make(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in _refused(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    assert f"{name!r} is missing" in _refused(_make(tmp_path, drop=name))


def test_wrong_shape(tmp_path: Path) -> None:
    message = _refused(_make(tmp_path, **{"model.layers.0.self_attn.k_proj.weight": (4, 8)}))
    assert "k_proj" in message and "(4, 8)" in message


def test_tensor_without_a_place(tmp_path: Path) -> None:
    message = _refused(_make(tmp_path, **{"model.layers.0.self_attn.q_norm.weight": (4,)}))
    assert "q_norm" in message and "no place" in message


def test_only_a_pickle(tmp_path: Path) -> None:
    (_make(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = _refused(tmp_path)
    assert "pickle" in message and "safetensors" in message


def test_index_names_a_shard_that_is_not_there(tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002.safetensors"}}
    _sharded(tmp_path, json.dumps(index))
    assert "model-00002.safetensors" in _refused(tmp_path)


def _sharded(folder: Path, index: str) -> None:
    """The weights in a shard, and an index."""
    (_make(folder) / "model.safetensors").rename(folder / "model-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize("name", ["../model-00001.safetensors", "a/../../m.safetensors", "/etc/m.safetensors"])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    _sharded(tmp_path, json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert f"names {name!r}, which is outside of the folder" in _refused(tmp_path)


def test_shards_may_lie_in_a_subfolder(tmp_path: Path) -> None:
    want = interop.load(str(_make(tmp_path))).params
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(SHAPES, "weights/a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, interop.load(str(tmp_path)).params, want)


def test_an_index_beside_the_whole_file_is_left_over(tmp_path: Path) -> None:
    """As in transformers, which looks for the whole file first."""
    (_make(tmp_path) / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    interop.load(str(tmp_path))


HEAD = {"lm_head.weight": (16, 8)}


def test_a_tied_head_that_differs_is_not_dropped(tmp_path: Path) -> None:
    message = _refused(_make(tmp_path, **HEAD))
    assert "tie_word_embeddings: true" in message and "'lm_head.weight' that differs" in message
    kept = interop.load(str(_make(tmp_path, {"tie_word_embeddings": False}, **HEAD)))
    assert kept.params["head"]["kernel"].shape == (8, 16)


def test_a_tied_table_under_either_name(tmp_path: Path) -> None:
    want = interop.load(str(_make(tmp_path))).params["embed"]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, str(file))
    np.testing.assert_array_equal(interop.load(str(tmp_path)).params["embed"], want)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, str(file))
    np.testing.assert_array_equal(interop.load(str(tmp_path)).params["embed"], want)


def test_untied_without_a_head(tmp_path: Path) -> None:
    assert "'lm_head.weight' is missing" in _refused(_make(tmp_path, {"tie_word_embeddings": False}))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8, np.uint8, np.int32, bool])
def test_weights_in_a_quantised_form(tmp_path: Path, dtype: Any) -> None:
    file = _make(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(dtype)
    save_file(tensors, str(file))
    message = _refused(tmp_path)
    assert f"tensor {name!r} is stored as" in message and "F32" in message


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_in_other_floating_point_types(tmp_path: Path, dtype: Any) -> None:
    file = _make(tmp_path) / "model.safetensors"
    tensors = {k: v.astype(dtype) for k, v in load_file(file).items()}
    save_file(tensors, str(file))
    got = interop.load(str(tmp_path)).params
    assert got["embed"].dtype == np.float32
    np.testing.assert_array_equal(got["embed"], tensors["model.embed_tokens.weight"].astype(np.float32))
    assert interop.reader(str(tmp_path)).dtype() == {8: "float32"}.get(np.dtype(dtype).itemsize, np.dtype(dtype).name)


@pytest.mark.parametrize("method", ["fp8", "gptq", None])
def test_a_quantised_checkpoint_is_named(tmp_path: Path, method: str | None) -> None:
    about = {"quant_method": method} if method else {"bits": 4}
    message = _refused(_make(tmp_path, {"quantization_config": about}))
    assert "quantization_config" in message and (method or "unnamed") in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3, "b": null}}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    _sharded(tmp_path, text)
    assert "index.json" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "lama"}, ("model_type", "'lama'", "did you mean 'llama'")),
        ({"model_type": None}, ("model_type", "valid")),
        ({"hidden_act": "tanh"}, ("hidden_act", "'tanh'", "silu")),
        ({"hidden_size": None}, ("hidden_size", "missing")),
        ({"num_key_value_heads": 3}, ("n_kv_heads", "does not divide")),
        ({"rope_parameters": {"rope_type": "yarnn", "factor": 2.0}}, ("rope_type", "'yarnn'", "yarn")),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, ("rope_type", "mrope")),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ("factor", "at least 1")),
        ({"rope_parameters": {"a": {"rope_type": "default"}}}, ("rope_parameters", "layer type")),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, ("short_factor",)),
    ],
)
def test_configurations_that_cannot_be_expressed(tmp_path: Path, config: dict[str, Any], words: Any) -> None:
    message = _refused(_make(tmp_path, config))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"residual_multiplier": 0.2}, "config.json residual_multiplier: found 0.2, which the family 'llama'"),
        ({"atention_bias": True}, "did you mean 'attention_bias'"),
        ({"model_type": "mistral", "attention_bias": True}, "config.json attention_bias: found True, which the family"),
        ({"per_layer_config": {"0": {"num_attention_heads": 1}}}, "config.json per_layer_config"),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, "config.json clip_qkv: found 8.0"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "valid: default, longrope, su, yarn",
        ),
        ({"model_type": "smollm3", "no_rope_layers": []}, "no_rope_layers: 0 found, num_hidden_layers = 1"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval: found 0; valid: 1 or more"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention: found true"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar: found 0; valid: 1 or more"),
        ({"model_type": "gemma2", "hidden_act": "gelu"}, "hidden_act: found 'gelu' beside hidden_activation ="),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping: found 50.0; valid: null",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 3.0}},
            "valid: one each for full_attention and",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_theta": "x"}}},
            "rope_parameters full_attention rope_theta: expected a number",
        ),
        ({"model_type": "gpt_oss", "hidden_act": "gelu"}, "hidden_act: unknown name 'gelu'"),
        ({"model_type": "gpt_oss", "num_key_value_heads": 2, "swiglu_limit": 0.0}, "model.ffn.limit: must be positive"),
        (
            {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
            "weights quantised by 'mxfp4' are not read",
        ),
        (
            {"model_type": "deepseek_v3", "head_dim": None, "rope_interleave": False},
            "rope_interleave: found False; valid",
        ),
        ({"model_type": "deepseek_v3", "head_dim": None, "scoring_func": "softmax"}, "scoring_func: found 'softmax'"),
        ({"model_type": "deepseek_v3"}, "head_dim: found 4; valid: 64, in this model"),
        ({"model_type": "qwen2_moe", "num_experts": 4, "num_local_experts": 3}, "found 3 beside num_experts = 4"),
    ],
)
def test_what_changes_the_computation_and_has_no_place(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    """A key that is not known, a value that the family cannot have: by name, before a weight is read."""
    sizes = {"model_type": "llama", "head_dim": 4}
    assert words in _refused(_make(tmp_path, {**sizes, **config}))


def test_what_changes_nothing_is_no_obstacle(tmp_path: Path) -> None:
    idle = {"transformers.js_config": {}, "unsloth_version": "1", "_attn_implementation": "sdpa", "use_cache": False}
    off = {
        "use_mrope": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "clip_qkv": None,
        "temperature": 0.6,
    }
    interop.load(str(_make(tmp_path, {**idle, **off})))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "minicpm3", "kv_lora_rank": 4}, ("latent attention (MLA)", "keys without a place", "kv_lora")),
        ({"model_type": "mamba", "state_size": 16, "conv_kernel": 4}, ("state-space layers (SSM)",)),
        ({"model_type": "t5", "is_encoder_decoder": True, "d_kv": 4}, ("an encoder beside the decoder",)),
        ({"model_type": "bert", "type_vocab_size": 2}, ("an encoder without a decoder",)),
        (
            {"model_type": "gemma3", "vision_config": {}, "text_config": {"model_type": "gemma3_text"}},
            ("images", "nearest known: 'gemma3_text'"),
        ),
        (
            {"model_type": "granite", "residual_multiplier": 0.2},
            ("multipliers of the stream", "nearest known: '"),
        ),
        ({"model_type": "olmo"}, ("did you mean 'olmo2'", "nearest known: 'olmo2', by its keys alone")),
        ({"model_type": ["x"]}, ("expected a string",)),
    ],
)
def test_a_family_that_is_not_known(tmp_path: Path, config: dict[str, Any], words: tuple[str, ...]) -> None:
    """The nearest one, and what is missing there."""
    message = _refused(_make(tmp_path, config))
    for word in words:
        assert word in message, message


RIGHT: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "n_embd": 8, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt_neox", "gpt2", "smollm3", "gemma3_text", "gpt_oss"])
def test_values_of_another_type_are_named(tmp_path: Path, family: str) -> None:
    """Every key that is read, with every type but its own."""
    _make(tmp_path)
    for kind, keys in schema.TOP.items():
        for key in keys.split():
            for value in ("x", 1.5, True, 3, [], ["a"], [1], {}, {"a": 1}):
                if schema.KINDS[kind](value):
                    continue
                (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **RIGHT, "model_type": family, key: value}))
                message = _refused(tmp_path)
                assert f"config.json {key}: expected {kind}" in message, (key, value)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "linear"}, ("rope_parameters.factor", "'linear' needs it")),
        ({"rope_type": "dynamic", "factor": None}, ("rope_parameters.factor", "'dynamic' needs it")),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, ("high_freq_factor", "'llama3' needs it")),
        ({"rope_type": "longrope", "short_factor": [1.0, 1.0]}, ("long_factor", "'longrope' needs it")),
        ({"rope_type": "linear", "factor": "x"}, ("rope_parameters factor", "a number", "'x'")),
        ({"rope_theta": "x"}, ("rope_parameters rope_theta", "a number")),
        ({"rope_type": "default", "rope_thetta": 5.0}, ("rope_parameters.rope_thetta", "did you mean 'rope_theta'")),
        ({"rope_type": "default", "short_mscale": 1.1}, ("rope_parameters.short_mscale: found 1.1, unknown",)),
        ({"rope_theta": 0}, ("theta", "must exceed 1")),
        ({"rope_type": ["x"]}, ("rope_type", "a string")),
        ({"partial_rotary_factor": 0.0}, ("fraction", "rotary width")),
        ({"rope_type": "longrope", "short_factor": "x", "long_factor": 3}, ("short_factor", "a list of numbers")),
    ],
)
def test_rotary_settings_that_are_incomplete(tmp_path: Path, rope: dict[str, Any], words: tuple[str, ...]) -> None:
    message = _refused(_make(tmp_path, {"rope_parameters": rope}))
    for word in words:
        assert word in message


def test_layer_types_of_another_number_of_layers(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "layer_types": ["full_attention"] * 2, "num_key_value_heads": 2}
    assert "layer_types: 2 found, num_hidden_layers = 1" in _refused(_make(tmp_path, config))


def test_config_is_not_json(tmp_path: Path) -> None:
    (_make(tmp_path) / "config.json").write_text("{")
    assert "config.json" in _refused(tmp_path)


@pytest.mark.parametrize("name", ["smollm2-135", "no/such/path"])
def test_no_such_checkpoint(name: str) -> None:
    assert "smollm2-135m" in _refused(name)


def test_directory_without_config(tmp_path: Path) -> None:
    assert "config.json" in _refused(tmp_path)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt" in _refused(tmp_path / "notes.txt")


def test_foreign_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    vocab = {f"t{i}": i for i in range(20)}
    Tokenizer(models.WordLevel(vocab, unk_token="t0")).save(str(_make(tmp_path) / "tokenizer.json"))
    message = _refused(tmp_path)
    assert "20 ids" in message and "vocab_size = 16" in message


def test_tokenizer_file_is_broken(tmp_path: Path) -> None:
    (_make(tmp_path) / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in _refused(tmp_path)


Q, NORM, DOWN = (f"model.layers.0.{n}.weight" for n in ("self_attn.q_proj", "input_layernorm", "mlp.down_proj"))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (DOWN, lambda x: x.T.copy(), "has shape (12, 8), which does not give"),
        (DOWN, lambda x: x.reshape(-1), "has shape (96,), which does not give"),
        (Q, lambda x: x.reshape(-1), "has shape (64,), which does not give"),
        (Q, lambda x: x.reshape(4, 16), "has shape (4, 16), which does not give"),
        (Q, lambda x: x.reshape(2, 4, 8), "has shape (2, 4, 8), which does not give"),
        (NORM, lambda x: x[None], "has shape (1, 8), which does not give"),
        ("model.embed_tokens.weight", lambda x: x.T.copy(), "has shape (8, 16), which does not give"),
        (Q, lambda x: np.where(x == x[3, 5], np.nan, x), "has numbers that are not finite"),
        (NORM, lambda x: np.where(x == x[7], np.inf, x), "has numbers that are not finite"),
        (DOWN, lambda x: np.where(x == x[7, 11], -np.inf, x).astype(np.float16), "has numbers that are not finite"),
        (Q, lambda x: np.where(x == x[0, 0], 1e300, x.astype(np.float64)), "has numbers too large for float32"),
        (Q, lambda x: x.astype(np.int32), "is stored as I32"),
        (Q, lambda x: x > 0, "is stored as BOOL"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path: Path, name: str, change: Any, words: str) -> None:
    """Of any other shape than the library of the file writes, of another type, or not finite: the tensor is named."""
    tensors = load_file(_make(tmp_path) / "model.safetensors")
    save_file({**tensors, name: change(tensors[name])}, str(tmp_path / "model.safetensors"))
    message = _refused(tmp_path)
    assert f"tensor {name!r} {words}" in message, message


def test_weights_that_are_too_large_for_the_type_asked_for(tmp_path: Path) -> None:
    tensors = load_file(_make(tmp_path) / "model.safetensors")
    tensors[DOWN][0, 0] = 70000.0
    save_file(tensors, str(tmp_path / "model.safetensors"))
    interop.load(str(tmp_path))
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight' has numbers too large for float16"):
        interop.load(str(tmp_path), dtype="float16")


@pytest.mark.parametrize("eps", ["NaN", "Infinity", "1e999", "-1e-6", "1.0", "1e10", "true"])
def test_an_epsilon_that_no_norm_has(tmp_path: Path, eps: str) -> None:
    text = (_make(tmp_path) / "config.json").read_text()
    (tmp_path / "config.json").write_text(text[:-1] + f', "rms_norm_eps": {eps}}}')
    assert "rms_norm_eps: expected a number from 0 to 1" in _refused(tmp_path)


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../other/model.safetensors", "a/../../model.safetensors", "..", "a\0b"]
)
def test_shards_stay_in_their_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    folder = _make(tmp_path / "model")
    _make(tmp_path / "other")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, shard)}))
    assert "model.safetensors.index.json" in _refused(folder) or shard in _refused(folder)
