"""Adapters on mixtures of experts as PEFT keeps them: it loads them to our logits, and we read them back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import interop
from lm.config import ModelConfig, model_config
from lm.errors import UserError
from lm.interop.writers import peft_folder, to_huggingface
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.surgery.lora import LoRA

BASE = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_positions": 64}
QK = {"mixer": {"name": "softmax", "qk_norm": True}, "head_dim": 16}
SPARSE = {"name": "moe", "experts": 4, "d_expert": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**BASE, "ffn": {"name": "moe", "experts": 3}},
    "qwen3_moe": {**BASE, **QK, "ffn": SPARSE},
    "qwen2_moe": {
        **BASE,
        "n_layers": 4,
        "mixer": {"name": "softmax", "qkv_bias": True},
        "ffn": {
            **SPARSE,
            "shared": 40,
            "shared_gate": True,
            "every": 2,
            "router": {"name": "topk", "softmax": "before"},
        },
    },
}
ALL = ("*/ffn/experts/*/kernel", "*/attn/q/kernel")
CASES: dict[str, tuple[str, LoRA]] = {
    "all matrices": ("mixtral", LoRA(targets=ALL, rank=3, alpha=5.0)),
    "all matrices, by the root": ("qwen3_moe", LoRA(targets=ALL, rank=3, alpha=5.0, rank_stabilized=True)),
    "some layers have none": ("qwen2_moe", LoRA(targets=ALL, rank=2)),
    "one matrix of two": ("mixtral", LoRA(targets=("*/experts/up/kernel",), rank=2)),
    "the second parameter alone": ("qwen3_moe", LoRA(targets=("*/experts/down/kernel",), rank=2)),
    "the router": ("mixtral", LoRA(targets=("*/ffn/router/kernel", "*/attn/v/kernel"), rank=2)),
    "all there is, dense layers and a shared expert too": ("qwen2_moe", LoRA(targets=("*/kernel",), rank=1)),
    "the router and experts": ("qwen3_moe", LoRA(targets=("*/ffn/router/kernel", "*/experts/*/kernel"), rank=2)),
}
TEXT = np.random.default_rng(0).integers(0, 64, (1, 17))


def drawn(family: str, lora: LoRA) -> tuple[ModelConfig, Any, Any]:
    """A model, its parameters and trained adapters."""
    cfg = model_config(FAMILIES[family])
    params = params_lib.init(cfg, jax.random.key(0))
    leaves, tree = jax.tree.flatten(lora.init(cfg, params, jax.random.key(1)))
    rng = np.random.default_rng(1)
    trained = tree.unflatten([x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) for x in leaves])
    return cfg, params, trained


def logits(cfg: ModelConfig, params: Any) -> np.ndarray:
    return np.asarray(DecoderModel(cfg).apply(params, Inputs(jnp.asarray(TEXT))).logits_BTV)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], tuple[Path, Path, np.ndarray, np.ndarray]]:
    """Writes base and adapter; their folders, the logits of the base and of both."""
    family, lora = CASES[request.param]

    def write() -> tuple[Path, Path, np.ndarray, np.ndarray]:
        cfg, params, trained = drawn(family, lora)
        to_huggingface.write(tmp_path / "base", cfg, params)
        peft_folder.write(tmp_path / "adapter", lora, cfg, trained, family, str(tmp_path / "base"))
        plain, both = logits(cfg, params), logits(cfg, lora.merge(cfg, params, trained))
        assert np.abs(plain - both).max() > 1e-2
        return tmp_path / "base", tmp_path / "adapter", plain, both

    return write


def test_peft_loads_it_to_the_same_logits(case: Callable[[], tuple[Path, Path, np.ndarray, np.ndarray]]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch has no build for this Python here")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base, adapter, _, want = case()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        got = model(torch.as_tensor(TEXT)).logits.numpy()
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_it_is_read_back(case: Callable[[], tuple[Path, Path, np.ndarray, np.ndarray]]) -> None:
    base, adapter, _, want = case()
    found = interop.load(f"{base} + {adapter}")
    np.testing.assert_allclose(logits(found.config, found.params), want, atol=1e-4)


def test_a_base_of_the_hub_is_named_as_one(tmp_path: Path) -> None:
    lora = LoRA(rank=2)
    cfg, _, trained = drawn("mixtral", lora)
    commit = "0123456789abcdef" * 2 + "01234567"
    peft_folder.write(tmp_path / "adapter", lora, cfg, trained, "mixtral", f"hf:ann/model@{commit}")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["base_model_name_or_path"], about["revision"]) == ("ann/model", commit)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoRA(targets=("embed",), rank=2), "embed/lora_a has no place"),
        (LoRA(targets=(), whole=("final_norm/scale",)), "final_norm/scale has no place"),
    ],
    ids=["a table", "a whole parameter"],
)
def test_what_peft_keeps_otherwise_is_refused(lora: LoRA, words: str, tmp_path: Path) -> None:
    cfg, _, trained = drawn("mixtral", lora)
    with pytest.raises(UserError) as e:
        peft_folder.write(tmp_path / "adapter", lora, cfg, trained, "mixtral", "")
    assert words in str(e.value) and not (tmp_path / "adapter").exists()
