"""Checkpoints out: back in without a change, into transformers with the same logits and text, refusals that name it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import convert
from lm import interop
from lm.config import ModelConfig, merge, model_config
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import Generator, Sampling
from lm.errors import UserError
from lm.interop.readers import run_folder
from lm.interop.writers import to_huggingface
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

LLAMA = {
    "vocab_size": 258,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "max_positions": 64,
}
LAYER = {"name": "layernorm", "eps": 1e-5}
GEMMA = {
    **LLAMA,
    "head_dim": 10,
    "norm": {"name": "rmsnorm", "eps": 1e-6, "unit_offset": True},
    "norm_place": "both",
    "embed_scale": 32**0.5,
    "ffn": {"name": "geglu_tanh"},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama untied, biases": (
        "llama",
        {
            **LLAMA,
            "head": {"name": "linear", "tie": False},
            "mixer": {"name": "softmax", "qkv_bias": True, "out_bias": True},
        },
    ),
    "llama yarn": (
        "llama",
        {**LLAMA, "positions": {"name": "rope", "scaling": {"name": "yarn", "factor": 4.0, "original": 16}}},
    ),
    "mistral": ("mistral", {**LLAMA, "pattern": {"name": "sliding_window", "window": 8}}),
    "qwen2": (
        "qwen2",
        {
            **LLAMA,
            "mixer": {"name": "softmax", "qkv_bias": True},
            "layer_overrides": ({"layers": "1", "pattern": {"name": "sliding_window", "window": 8}},),
        },
    ),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 16, "mixer": {"name": "softmax", "qk_norm": True}}),
    "mixtral": ("mixtral", {**LLAMA, "ffn": {"name": "moe", "experts": 3, "load_balance_loss": 0.02}}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **LLAMA,
            "n_layers": 4,
            "mixer": {"name": "softmax", "qkv_bias": True},
            "ffn": {
                "name": "moe",
                "experts": 4,
                "d_expert": 24,
                "shared": 40,
                "shared_gate": True,
                "every": 2,
                "router": {"name": "topk", "softmax": "before"},
            },
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **LLAMA,
            "head_dim": 16,
            "mixer": {"name": "softmax", "qk_norm": True},
            "ffn": {"name": "moe", "experts": 4, "d_expert": 24, "capacity": 1.5},
        },
    ),
    "pythia": (
        "gpt_neox",
        {
            **LLAMA,
            "n_kv_heads": 4,
            "norm": LAYER,
            "ffn": {"name": "gelu", "bias": True},
            "mixer": {"name": "softmax", "qkv_bias": True, "out_bias": True},
            "positions": {"name": "rope", "fraction": 0.5},
            "head": {"name": "linear", "tie": False},
            "parallel_residual": True,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            **LLAMA,
            "n_kv_heads": 4,
            "norm": LAYER,
            "ffn": {"name": "gelu_tanh", "bias": True},
            "mixer": {"name": "softmax", "qkv_bias": True, "out_bias": True},
            "positions": {"name": "learned", "size": 64},
        },
    ),
    "olmo2": (
        "olmo2",
        {
            **LLAMA,
            "head_dim": 10,
            "norm_place": "output",
            "mixer": {"name": "softmax", "qk_norm": True, "qk_norm_over": "width"},
        },
    ),
    "phi3": ("phi3", {**LLAMA, "positions": {"name": "rope", "fraction": 0.5}}),
    "phi3 longrope": (
        "phi3",
        {
            **LLAMA,
            "n_heads": 4,
            "pattern": {"name": "sliding_window", "window": 8},
            "positions": {
                "name": "rope",
                "fraction": 0.5,
                "scaling": {
                    "name": "longrope",
                    "short_factor": (1.0, 1.5),
                    "long_factor": (2.0, 3.0),
                    "original": 32,
                },
            },
            "head": {"name": "linear", "tie": False},
        },
    ),
    "smollm3": (
        "smollm3",
        {
            **LLAMA,
            "layer_overrides": (
                {"layers": "1", "positions": {"name": "nope"}, "pattern": {"name": "sliding_window", "window": 8}},
            ),
        },
    ),
    "gemma2": (
        "gemma2",
        {**GEMMA, "head": {"name": "linear", "softcap": 20.0}, "mixer": {"name": "softmax", "softcap": 30.0}},
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **GEMMA,
            "mixer": {"name": "softmax", "qk_norm": True, "scale": 7**-0.5, "qkv_bias": True, "out_bias": True},
            "positions": {"name": "rope", "theta": 5000.0, "scaling": {"name": "linear", "factor": 4.0}},
            "layer_overrides": (
                {
                    "layers": "0",
                    "positions": {"name": "rope", "theta": 100.0},
                    "pattern": {"name": "sliding_window", "window": 8},
                },
            ),
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **LLAMA,
            "mixer": {"name": "softmax", "qkv_bias": True, "out_bias": True, "sink_logits": True},
            "ffn": {
                "name": "moe",
                "experts": 4,
                "expert": "clamped_swiglu",
                "expert_settings": {"bias": True, "alpha": 1.2, "limit": 0.5},
                "router": {"name": "topk", "offset": True},
            },
            "layer_overrides": ({"layers": "0", "pattern": {"name": "sliding_window", "window": 8}},),
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **LLAMA,
            "n_layers": 3,
            "n_kv_heads": 4,
            "head_dim": 6,
            "mixer": {
                "name": "mla",
                "kv_rank": 7,
                "q_rank": 9,
                "nope_dim": 5,
                "v_dim": 8,
                "latent_eps": 1e-6,
            },
            "ffn": {
                "name": "moe",
                "experts": 6,
                "d_expert": 12,
                "shared": 24,
                "first_dense": 1,
                "router": {"name": "deepseek_v3", "k": 3, "groups": 3, "keep_groups": 2, "bias_rate": 0.01},
            },
        },
    ),
}
TEXT = [ord(c) for c in "Once upon a time"]


@functools.cache
def made(name: str) -> tuple[ModelConfig, Any]:
    """A model and its random parameters; compiles nothing."""
    cfg, rng = model_config(MODELS[name][1]), np.random.default_rng(0)

    def drawn(path: Any, leaf: Any) -> np.ndarray:
        around = 1.0 if path[-1].key == "scale" else 0.0
        return np.asarray(rng.normal(around, 0.15, leaf.shape), leaf.dtype)

    return cfg, jax.tree_util.tree_map_with_path(drawn, params_lib.abstract(cfg))


def logits(cfg: ModelConfig, weights: Any) -> jax.Array:
    """``[1, T, V]`` of `TEXT`."""
    run = jax.jit(lambda weights, tokens_BT: DecoderModel(cfg).apply(weights, Inputs(tokens_BT)).logits_BTV)
    return run(weights, jnp.asarray([TEXT]))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    cfg, weights = made(name)
    assert to_huggingface.write(tmp_path / "out", cfg, weights, TextRecord.of(ByteTokenizer())) == MODELS[name][0]
    back = interop.load(str(tmp_path / "out"))
    assert jax.tree.structure(back.params) == jax.tree.structure(weights)
    jax.tree.map(np.testing.assert_array_equal, back.params, weights)
    assert [layer.pattern for layer in back.config.layers()] == [layer.pattern for layer in cfg.layers()]
    assert back.tokenizer is not None and (back.text.eos_id, back.text.bos_id) == (257, 256)
    text = "naïve café\n\t日本 \x00!"
    assert (
        list(back.tokenizer.encode(text)) == list(text.encode()) and back.tokenizer.decode(list(text.encode())) == text
    )


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it_to_the_same_logits_and_text(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch has no build for this Python here")
    transformers = pytest.importorskip("transformers")
    cfg, weights = made(name)
    to_huggingface.write(tmp_path / "out", cfg, weights, TextRecord.of(ByteTokenizer()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert ids.tolist() == [TEXT]
    with torch.no_grad():
        want = theirs(ids).logits.numpy()
        text = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    np.testing.assert_allclose(logits(cfg, weights), want, atol=2e-4)
    answer = Generator(DecoderModel(cfg), weights)([TEXT], Sampling(temperature=0.0), max_new_tokens=12)[0][0]
    assert answer.tokens == text[len(TEXT) :]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"ffn": {"name": "relu2"}}, "model.ffn.name = 'relu2'"),
        ({"positions": {"name": "alibi"}}, "model.positions"),
        ({"positions": {"name": "rope", "scaling": {"name": "ntk", "factor": 2.0}}}, "model.positions.scaling"),
        ({"pattern": {"name": "lm_infinite"}}, "pattern.name = 'lm_infinite'"),
        ({"mixer": {"name": "softmax", "softcap": 30.0}}, "model.mixer.softcap = 30.0"),
        ({"embed_scale": 4.0}, "model.embed_scale = 4.0"),
        ({"parallel_residual": True}, "model.parallel_residual = True"),
        ({"norm_place": "output"}, "model.norm_place = 'output'"),
        ({"mixer": {"name": "softmax", "sink_logits": True}}, "model.mixer.sink_logits = True"),
        ({"layer_overrides": ({"layers": "1", "mixer": {"scale": 0.5}},)}, "model.layer 1 mixer.scale = 0.5"),
        ({"norm": {"name": "rmsnorm", "unit_offset": True}}, "model.norm.unit_offset = True"),
    ],
)
def test_what_no_family_can_say_is_named(change: dict[str, Any], names: str, tmp_path: Path) -> None:
    cfg = merge(model_config(LLAMA), change, "model")
    with pytest.raises(UserError) as e:
        to_huggingface.write(tmp_path / "out", cfg, params_lib.init(cfg, jax.random.key(0)))
    assert names in str(e.value) and "cannot express" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_dies_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, weights = made("llama")

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ByteTokenizer, "save", die)
    with pytest.raises(KeyboardInterrupt):
        to_huggingface.write(tmp_path / "out", cfg, weights, TextRecord.of(ByteTokenizer()))
    assert list(tmp_path.iterdir()) == []


def test_the_command_goes_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, weights = made("qwen3")
    to_huggingface.write(tmp_path / "hf", cfg, weights, TextRecord.of(ByteTokenizer(), "{{ messages[0].content }}"))
    assert convert.main([f"--checkpoint={tmp_path}/hf", f"--to={tmp_path}/run", "--as=run"]) == 0
    loaded = interop.load(str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, weights)
    assert (loaded.text.eos_id, loaded.text.bos_id) == (257, 256)
    assert loaded.text.templates == {"default": "{{ messages[0].content }}"}
    assert convert.main([f"--checkpoint={tmp_path}/run", f"--to={tmp_path}/again"]) == 0
    for file in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file
    assert "as qwen3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--to=hf"], "--to: hf exists already"),
        (["--to=new", "--family=lama"], "--family: unknown name 'lama' (did you mean 'llama'?)"),
        (["--to=new", "--family=gpt2"], "which gpt2 cannot express"),
        (["--to=new", "--as=onnx"], "--as: unknown name 'onnx'"),
        (["--to=new", "--max-shard-size=5"], "--max-shard-size: found '5'; valid: a number with KB, MB, GB or TB"),
        (["--to=new", "--mesh=tensr=2"], "--mesh: unknown name 'tensr' (did you mean 'tensor'?)"),
        (["--to=new", "--mesh=tensor=3"], "--mesh: tensor 3 does not fit 8 devices"),
        (["--to=new", "--mesh=tensor=8"], "does not divide by 8 (tensor 8); valid: 1, 2 devices"),
        (["--to=new", "--mesh=stage=2"], "--mesh: unknown name 'stage'"),
        (["--to=new", "--as=peft", "--adapter=x"], "--adapter: is one of PEFT's already"),
        (["--to=new", "--adapter=x"], "--adapter: x: no adapter_config.json"),
        (["--to=new", "--as=run", "--family=llama"], "--family: a run's folder has none"),
        (["--to=file/new"], "file/new: cannot be written"),
        ([], "--to"),
        (["--to=new", "--too=x"], "--too: unknown argument (did you mean '--to'?)"),
    ],
)
def test_mistakes_of_the_command(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    to_huggingface.write(tmp_path / "hf", *made("llama"))
    (tmp_path / "file").write_text("x")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert convert.main(["--checkpoint=hf", *args]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_folder_that_only_looks_like_a_run(tmp_path: Path) -> None:
    (tmp_path / run_folder.FILE).write_text("[]")
    with pytest.raises(UserError, match="not the description of a training run"):
        interop.load(str(tmp_path))
    (tmp_path / run_folder.FILE).write_text(json.dumps({"model": LLAMA}))
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        interop.load(str(tmp_path))


def test_shards_and_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, weights = made("qwen2_moe")
    to_huggingface.write(tmp_path / "whole", cfg, weights, TextRecord.of(ByteTokenizer()))
    (tmp_path / "whole" / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    args = [f"--checkpoint={tmp_path}/whole", f"--to={tmp_path}/cut", "--max-shard-size=50KB"]
    assert convert.main(args) == 0
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "cut").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "cut" / f).stat().st_size < 60_000 for f in files)
    held = {name: load_file(tmp_path / "cut" / file)[name] for name, file in index["weight_map"].items()}
    want = load_file(tmp_path / "whole" / "model.safetensors")
    assert {k: (v.tobytes(), v.shape) for k, v in held.items()} == {k: (v.tobytes(), v.shape) for k, v in want.items()}
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in want.values())
    layers = [int(name.split(".")[2]) for name in index["weight_map"] if ".layers." in name]
    assert layers == sorted(layers)  # a layer's tensors are together
    back = interop.load(str(tmp_path / "cut"))
    jax.tree.map(np.testing.assert_array_equal, back.params, weights)
    said = (tmp_path / "cut" / "README.md").read_text()
    whole = interop.reader(str(tmp_path / "whole"))
    assert interop.licence(str(tmp_path / "cut")) == "mit" and whole.identity() in said
    assert "written as qwen2_moe in float32" in said and '"n_layers": 4' in said


def test_transformers_loads_shards_to_the_same_logits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch has no build for this Python here")
    transformers = pytest.importorskip("transformers")
    cfg, weights = made("pythia")
    to_huggingface.write(tmp_path / "out", cfg, weights, max_shard_size="20KB", dtype="bfloat16")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    with torch.no_grad():
        want = theirs(torch.tensor([TEXT])).logits.numpy()
    back = interop.load(str(tmp_path / "out"))
    np.testing.assert_allclose(logits(back.config, back.params), want, atol=2e-4)


def test_a_parameter_on_several_devices_is_written_as_on_one(tmp_path: Path) -> None:
    for family in ("qwen3", "gpt2"):
        cfg, weights = made(family)
        to_huggingface.write(tmp_path / family, cfg, weights)
        args = [f"--checkpoint={tmp_path}/{family}", f"--to={tmp_path}/{family}-2", "--mesh=tensor=2,fsdp=4"]
        assert convert.main(args) == 0
        one, two = (tmp_path / f / "model.safetensors" for f in (family, f"{family}-2"))
        assert one.read_bytes() == two.read_bytes()
