"""PEFT adapters onto checkpoints: the logits of PEFT itself, on every family and kind of setting; refusals by name."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import convert, generate
from lm import interop
from lm.config import ModelConfig, model_config
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer
from lm.errors import UserError
from lm.interop.adapters.settings import Settings
from lm.interop.writers import run_folder, to_huggingface
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

BASE = {"vocab_size": 258, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_positions": 64}
UNTIED = {"head": {"name": "linear", "tie": False}}
BIASED = {"name": "softmax", "qkv_bias": True, "out_bias": True}
LAYER = {"name": "layernorm", "eps": 1e-5}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**BASE, **UNTIED, "mixer": BIASED},
    "qwen3": {**BASE, "head_dim": 16, "mixer": {"name": "softmax", "qk_norm": True}},
    "mixtral": {**BASE, **UNTIED, "ffn": {"name": "moe", "experts": 3}},
    "qwen2_moe": {
        **BASE,
        "mixer": {"name": "softmax", "qkv_bias": True},
        "ffn": {
            "name": "moe",
            "experts": 4,
            "d_expert": 24,
            "shared": 40,
            "shared_gate": True,
            "router": {"name": "topk", "softmax": "before"},
        },
    },
    "gpt_neox": {
        **BASE,
        **UNTIED,
        "n_kv_heads": 4,
        "norm": LAYER,
        "ffn": {"name": "gelu", "bias": True},
        "mixer": BIASED,
        "positions": {"name": "rope", "fraction": 0.5},
        "parallel_residual": True,
    },
    "gpt2": {
        **BASE,
        "n_kv_heads": 4,
        "norm": LAYER,
        "ffn": {"name": "gelu_tanh", "bias": True},
        "mixer": BIASED,
        "positions": {"name": "learned", "size": 64},
    },
}
# Family, and what PEFT is asked for.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a list": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "a pattern": ("llama", {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(o|up)_proj"}),
    "all linear": ("qwen3", {"target_modules": "all-linear", "use_rslora": True}),
    "ranks and alphas by pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 20},
        },
    ),
    "one layer, and exceptions": (
        "llama",
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "exclude_modules": ["o_proj"]},
    ),
    "layers by their pattern": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"},
    ),
    "modules saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "all biases": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of what is adapted": ("gpt_neox", {"target_modules": ["dense_4h_to_h", "dense"], "bias": "lora_only"}),
    "fused": ("gpt_neox", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "inputs first": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "o_proj", "gate_proj"], "use_dora": True}),
    "DoRA, fused": ("gpt_neox", {"target_modules": ["query_key_value"], "use_dora": True}),
    "DoRA, inputs first": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "the embedding table": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "a shared expert": ("qwen2_moe", {"target_modules": [r"shared_expert.up_proj", "q_proj"]}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "one matrix of the experts": (
        "qwen2_moe",
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
    ),
    "the router": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"]}),
}
TEXT = np.array([[ord(c) for c in "Once upon a time"]])


@functools.cache
def drawn(family: str) -> tuple[ModelConfig, Any]:
    cfg = model_config(FAMILIES[family])
    leaves, tree = jax.tree.flatten(params_lib.init(cfg, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return cfg, tree.unflatten([x + 0.15 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder of a family."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            to_huggingface.write(root / family, *drawn(family), TextRecord.of(ByteTokenizer()))
        return root / family

    return folder


def logits(found: interop.Checkpoint) -> np.ndarray:
    return np.asarray(DecoderModel(found.config).apply(found.params, Inputs(jnp.asarray(TEXT))).logits_BTV)


def theirs(base: Path, to: Path, settings: dict[str, Any]) -> np.ndarray:
    """An adapter with random factors, saved by PEFT, and its logits with the base."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if "magnitude" in name:
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor))
            elif "lora_" in name or tensor.requires_grad:
                tensor.add_(0.2 * torch.randn_like(tensor))
        want = made(torch.tensor(TEXT)).logits.numpy()
    made.save_pretrained(to)
    return want


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_peft(
    name: str, base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="PyTorch has no build for this Python here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    family, settings = CASES[name]
    want = theirs(base(family), tmp_path / "adapter", settings)
    found = interop.load(f"{base(family)} + {tmp_path}/adapter")
    same(logits(found), want)
    assert np.abs(want - logits(interop.load(str(base(family))))).max() > 1e-2
    if name in ("a list", "experts"):  # as another form of the same base: its parameters change when they are all there
        run_folder.write(tmp_path / "run", interop.load(str(base(family))))
        same(logits(interop.load(f"{tmp_path}/run + {tmp_path}/adapter")), want)


def test_convert_merges_and_two_adapters_add_up(base: Callable[[str], Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch has no build for this Python here")
    transformers = pytest.importorskip("transformers")
    first, second = tmp_path / "first", tmp_path / "second"
    theirs(base("llama"), first, {"target_modules": ["q_proj", "up_proj"]})
    assert convert.main([f"--checkpoint={base('llama')}", f"--adapter={first}", f"--to={tmp_path}/merged"]) == 0
    want = theirs(tmp_path / "merged", second, {"target_modules": ["q_proj"]})
    found = interop.load(f"{base('llama')} + {first} + {second}")
    same(logits(found), want)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        same(logits(interop.load(f"{base('llama')} + {first}")), merged(torch.tensor(TEXT)).logits.numpy())
    assert found.identity.count(" + ") == 2 and found.source.endswith(f" + {first} + {second}")


def by_hand(folder: Path, module: str = "model.layers.{i}.self_attn.q_proj", **settings: Any) -> Path:
    """An adapter of rank 2 written without PEFT; the module's in every layer of a Llama."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(2):
        key = f"base_model.model.{module.format(i=i)}"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((2, 32)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((32, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_by_the_equation(base: Callable[[str], Path], tmp_path: Path) -> None:
    """``W + (alpha / r) B A``, without PEFT."""
    folder = by_hand(tmp_path / "adapter")
    factors = load_file(folder / "adapter_model.safetensors")
    plain, found = (interop.load(s).params for s in (str(base("llama")), f"{base('llama')} + {folder}"))
    for i in range(2):
        key = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_"
        delta = 2.0 * factors[f"{key}B.weight"] @ factors[f"{key}A.weight"]
        got = found["blocks"]["attn"]["q"]["kernel"][i] - plain["blocks"]["attn"]["q"]["kernel"][i]
        np.testing.assert_allclose(got.reshape(32, 32), delta.T, atol=1e-5)
    for name in ("k", "v", "o"):
        a, b = (p["blocks"]["attn"][name]["kernel"] for p in (plain, found))
        np.testing.assert_array_equal(a, b)


def test_generate_reads_it(base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand(tmp_path / "adapter")
    args = ("--prompt=Once", "--max-new-tokens=8", "--json")
    assert convert.main([f"--checkpoint={base('llama')}", f"--adapter={folder}", f"--to={tmp_path}/merged"]) == 0
    said = []
    for source in ([f"--checkpoint={base('llama')}", f"--adapter={folder}"], [f"--checkpoint={tmp_path}/merged"]):
        capsys.readouterr()
        assert generate.main([*source, *args]) == 0
        said.append(json.loads(capsys.readouterr().out)["text"])
    assert said[0] == said[1]


def test_its_own_tokenizer_and_template_are_read(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    found = interop.load(f"{base('llama')} + {folder}", load_params=False)
    assert found.text.templates == {"default": "{{ messages[0].content }}!"} and found.tokenizer is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base("llama") / name, folder / name)
    again = interop.load(f"{base('llama')} + {folder}", load_params=False)
    assert again.text.templates == found.text.templates and again.text.eos_ids == found.text.eos_ids


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "adapter_config.json peft_type: found 'IA3'; valid: LORA"),
    "weights that it changes": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes"),
    "an unknown key": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: found [1, 2]"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication: found"),
    "biases of B": ({"lora_bias": True}, "lora_bias: found True"),
    "a wrong type": ({"r": "two"}, "r: expected int, found 'two'"),
    "another rank": (
        {"r": 3},
        "q_proj' has factors of shape (2, 32) and (32, 2); valid: a rank of 3",
    ),
    "a target without factors": (
        {"target_modules": ["q_proj", "k_proj"]},
        "'model.layers.0.self_attn.k_proj' is a target of adapter_config.json, but has no factors",
    ),
    "factors without a target": ({"target_modules": ["v_proj"]}, "q_proj' has factors, but is no target"),
    "magnitudes that are missing": ({"use_dora": True}, "has no magnitudes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_obeyed_is_named(
    name: str, base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, words = REFUSED[name]
    folder = by_hand(tmp_path / "adapter", **settings)
    args = [f"--checkpoint={base('llama')}", f"--adapter={folder}"]
    for command, more in ((generate.main, ["--prompt=a"]), (convert.main, [f"--to={tmp_path}/to"])):
        assert command([*args, *more]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert not (tmp_path / "to").exists()


def test_adapters_of_another_model(base: Callable[[str], Path], tmp_path: Path) -> None:
    wrong = by_hand(tmp_path / "names", "transformer.h.{i}.attn.c_attn", target_modules=["c_attn"])
    with pytest.raises(UserError, match=r"attn\.c_attn' has no weight in this model, read as llama"):
        interop.load(f"{base('llama')} + {wrong}")
    shape = by_hand(tmp_path / "shape", "model.layers.{i}.mlp.up_proj", target_modules=["up_proj"])
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' has shape \(32, 32\)"):
        interop.load(f"{base('llama')} + {shape}")
    tied = by_hand(tmp_path / "tied", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    tensors = load_file(tied / "adapter_model.safetensors")
    table = {"base_model.model.model.embed_tokens.weight": np.ones((258, 32), np.float32)}
    q = {k: np.zeros((64, 2), np.float32) if "lora_B" in k else v for k, v in tensors.items()}
    save_file({**q, **table}, tied / "adapter_model.safetensors")
    with pytest.raises(UserError, match="this model's head is the same table"):
        interop.load(f"{base('qwen3')} + {tied}")


def test_folders_that_hold_none(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"found only adapter_model\.bin, a pickle"):
        interop.load(f"{base('llama')} + {folder}")
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        interop.load(f"{base('llama')} + {folder}")
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        interop.load(f"{base('llama')} + {tmp_path}")


def test_settings_that_only_train_are_read_over(tmp_path: Path) -> None:
    said = {"peft_type": "LORA", "lora_dropout": 0.1, "inference_mode": True, "eva_config": {"rho": 2.0}, "r": 5}
    made = Settings.of(tmp_path, {**said, "corda_config": None, "something_new": None})
    assert (made.r, made.scale("x")) == (5, 8 / 5)
