"""Whole-model logits against `transformers` on random weights, family by family and scaling by scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import caches, interop
from lm.attention.branches import Tokens
from lm.config import model_config
from lm.errors import UserError
from lm.interop import families
from lm.interop.families.keys import IDLE
from lm.layer import LayerInputs
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

torch = pytest.importorskip("torch", reason="the PyTorch oracles need torch (CPU build, Python 3.11)")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
GQA = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
PADDED = {**GQA, "pad_token_id": 0}  # where the default is beyond so few tokens
EXT = [1.0 + 0.5 * i for i in range(4)]  # head_dim 8: four frequencies


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


LONGROPE = {"short_factor": EXT, "long_factor": [2 * x for x in EXT], "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("Llama", GQA, 48),
    "llama-mha-tied": ("Llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True}, 48),
    "llama-linear": ("Llama", {**GQA, **_rope("linear", factor=4.0)}, 150),
    "llama-dynamic-within": ("Llama", {**GQA, **_rope("dynamic", factor=4.0)}, 48),
    "llama-dynamic-beyond": ("Llama", {**GQA, **_rope("dynamic", factor=4.0)}, 150),
    "llama-yarn": ("Llama", {**GQA, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)}, 150),
    "llama-yarn-mscale": (
        "Llama",
        {**GQA, **_rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.3, original_max_position_embeddings=32)},
        150,
    ),
    "llama-longrope-short": ("Llama", {**GQA, "max_position_embeddings": 256, **_rope("longrope", **LONGROPE)}, 48),
    "llama-longrope-long": ("Llama", {**GQA, "max_position_embeddings": 256, **_rope("longrope", **LONGROPE)}, 150),
    "llama3": (
        "Llama",
        {
            **GQA,
            **_rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        },
        150,
    ),
    "mistral-window": ("Mistral", {**GQA, "sliding_window": 16}, 60),
    "qwen2": ("Qwen2", GQA, 48),
    "qwen2-window": (
        "Qwen2",
        {**GQA, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        48,
    ),
    "qwen2-window-of-no-layer": (
        "Qwen2",
        {**GQA, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
        48,
    ),
    "qwen2-window-null": ("Qwen2", {**GQA, "use_sliding_window": True, "sliding_window": None}, 48),
    "qwen2-layer-types": (
        "Qwen2",
        {
            **GQA,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        48,
    ),
    "qwen3": ("Qwen3", {**GQA, "head_dim": 16}, 48),
    "qwen3-window": (
        "Qwen3",
        {**GQA, "head_dim": 16, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        48,
    ),
    "mixtral": ("Mixtral", {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}, 48),
    "mixtral-window": ("Mixtral", {**GQA, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 12}, 48),
    "qwen2-moe": ("Qwen2Moe", {**GQA, **EXPERTS, "shared_expert_intermediate_size": 40}, 48),
    "qwen2-moe-window": (
        "Qwen2Moe",
        {
            **GQA,
            **EXPERTS,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 3,
        },
        48,
    ),
    "qwen2-moe-sparse": (
        "Qwen2Moe",
        {
            **GQA,
            **EXPERTS,
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
        },
        48,
    ),
    "qwen3-moe": ("Qwen3Moe", {**GQA, **EXPERTS, "head_dim": 16, "norm_topk_prob": True}, 48),
    "qwen3-moe-raw": ("Qwen3Moe", {**GQA, **EXPERTS, "head_dim": 16, "norm_topk_prob": False}, 48),
    # Heads of 16: four channels turn, two frequencies, so that the exponent's denominator matters.
    "neox": ("GPTNeoX", {**SMALL, "hidden_size": 64, "rotary_pct": 0.25, "intermediate_size": 128}, 48),
    "neox-sequential": ("GPTNeoX", {**SMALL, "rotary_pct": 1.0, "use_parallel_residual": False}, 48),
    "gpt2": (
        "GPT2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
        60,
    ),
    "gpt2-unscaled": (
        "GPT2",
        {
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 40,
            "scale_attn_weights": False,
            "initializer_range": 0.3,
        },
        60,
    ),
    "olmo2": ("Olmo2", {**GQA, "head_dim": 10}, 48),  # not in the class, and its model reads it
    "olmo2-tied-biases": (
        "Olmo2",
        {**SMALL, "tie_word_embeddings": True, "attention_bias": True, **_rope("linear", factor=4.0)},
        150,
    ),
    # Heads of 8, of which six channels turn: three frequencies.
    "phi3": ("Phi3", {**PADDED, "hidden_size": 40, "head_dim": 10, "sliding_window": 12}, 48),
    "phi3-partial": (
        "Phi3",
        {**PADDED, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        48,
    ),
    **{
        f"phi3-longrope-{name}": (
            "Phi3",
            {
                **PADDED,
                "partial_rotary_factor": 0.75,
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "longrope", "short_factor": EXT[:3], "long_factor": EXT[1:]},
            },
            length,
        )
        for name, length in (("short", 48), ("long", 150))
    },
    "smollm3": ("SmolLM3", {**PADDED, "num_hidden_layers": 4, "tie_word_embeddings": True}, 48),
    "smollm3-windows": (
        "SmolLM3",
        {
            **GQA,
            "head_dim": 10,
            "num_hidden_layers": 3,
            "pad_token_id": 0,
            "no_rope_layers": [0, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 12,
            "attention_bias": True,
            "mlp_bias": True,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=32),
        },
        150,
    ),
    "gemma2": (
        "Gemma2",
        {**GQA, "head_dim": 10, "sliding_window": 12, "query_pre_attn_scalar": 7, "tie_word_embeddings": True},
        48,
    ),
    "gemma2-untied-uncapped": (
        "Gemma2",
        {
            **GQA,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": 2.0,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 5,
        },
        48,
    ),
    "gemma3": (
        "Gemma3",
        {
            **GQA,
            "head_dim": 10,
            "num_hidden_layers": 3,
            "sliding_window": 12,
            "query_pre_attn_scalar": 7,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 20.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
        60,
    ),
    "gpt-oss": (
        "GptOss",
        {
            **GQA,
            "head_dim": 10,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 12,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.8,
        },
        60,
    ),
    "gpt-oss-tied-plain-rotary": (
        "GptOss",
        {
            **SMALL,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_bias": False,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "sliding_window": 5,
            **_rope("default"),
        },
        40,
    ),
}
DEEPSEEK = {
    **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 9,
    "kv_lora_rank": 7,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 5,
    "v_head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 3,
    "topk_group": 2,
    "rms_norm_eps": 1e-2,
}
CASES["deepseek-v3"] = ("DeepseekV3", DEEPSEEK, 48)
CASES["deepseek-v3-yarn"] = (
    "DeepseekV3",
    {
        **DEEPSEEK,
        "q_lora_rank": None,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "v_head_dim": 13,  # wider than keys
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        **_rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.3, original_max_position_embeddings=32),
    },
    150,
)
TEXT = {"Gemma3"}  # whose class of configurations has this in its name


def _save(case: str, folder: Path, **kwargs: Any) -> Any:
    name, fields, _ = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name in TEXT else f"{name}Config")(**fields)
    cls = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, cls)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norms start at constants, which would hide a mix-up
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "mlp" in name and not parameter.any():  # so do the routers of some families
                parameter.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0, 0.3)
    model.save_pretrained(folder, **kwargs)
    return model


STEPPED = ("olmo2", "phi3", "smollm3-windows", "gemma2", "gemma3", "gpt-oss", "deepseek-v3")


def _stepped(checkpoint: interop.Checkpoint, ids: np.ndarray) -> np.ndarray:
    """Logits by a piece and then one token at a time through the cache."""
    model, first = DecoderModel(checkpoint.config), 7
    cache, out = caches.init(checkpoint.config, *ids.shape), []
    step = jax.jit(lambda p, t, i, c: model.apply(p, Inputs(t, index_BT=i), c))
    for part in np.split(ids, [first, *range(first + 1, ids.shape[1])], axis=1):
        at = sum(x.shape[1] for x in out)
        index = np.broadcast_to(np.arange(at, at + part.shape[1], dtype=np.int32), part.shape)
        made = step(checkpoint.params, jnp.asarray(part), jnp.asarray(index), cache)
        cache = made.cache
        out.append(np.asarray(made.logits_BTV))
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    length = CASES[case][2]
    model = _save(case, tmp_path)
    ids = np.random.default_rng(0).integers(0, 96, (2, length))
    with torch.no_grad():
        want = model(torch.as_tensor(ids)).logits.numpy()
    checkpoint = interop.load(str(tmp_path))
    apply = jax.jit(lambda p, t: DecoderModel(checkpoint.config).apply(p, Inputs(t)).logits_BTV)
    got = np.asarray(apply(checkpoint.params, jnp.asarray(ids)))
    assert want.std() > 0.1, "the logits must vary for the comparison to mean anything"
    assert np.abs(got - want).max() <= 2e-4
    if case in STEPPED:
        assert np.abs(_stepped(checkpoint, ids) - want).max() <= 2e-4


def test_shards_equal_one_file(tmp_path: Path) -> None:
    model = _save("llama", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (interop.load(str(tmp_path / n)) for n in ("one", "many"))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_files_load_as_float32(tmp_path: Path) -> None:
    model = _save("llama", tmp_path / "f32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    checkpoint = interop.load(str(tmp_path / "bf16"))
    embed = model.get_input_embeddings().weight.detach().float().numpy()
    assert checkpoint.params["embed"].dtype == jnp.float32
    np.testing.assert_array_equal(checkpoint.params["embed"], embed)


# Without the length, which has a default of its own, the class refuses what its models then read.
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
# Switches that give other keys a meaning; each family is also compared as it comes.
ON: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "num_hidden_layers": 32},
    "qwen3": {"use_sliding_window": True, "num_hidden_layers": 32},
    "qwen2_moe": {"use_sliding_window": True, "num_hidden_layers": 32},
    "qwen3_moe": {"use_sliding_window": True, "mlp_only_layers": [1]},
    "smollm3": {"use_sliding_window": True, "sliding_window": 64},
    "phi3": {"rope_parameters": {**LONG, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}},
    "gemma3_text": {"num_hidden_layers": 7},
}


def _on(family: str) -> dict[str, Any]:
    """`ON`, for a class to change."""
    found: dict[str, Any] = json.loads(json.dumps(ON.get(family, {})))
    return found


DEFAULTS = [*((name, {}) for name in families.FAMILIES), *ON.items()]


@pytest.mark.parametrize(("family", "given"), DEFAULTS, ids=[f"{n}{'-on' if g else ''}" for n, g in DEFAULTS])
def test_an_absent_key_stands_for_what_it_does_in_transformers(family: str, given: dict[str, Any]) -> None:
    """Every key of the family's class of configurations, all of them left out and one at a time."""
    kind, read = transformers.CONFIG_MAPPING[family], families.FAMILIES[family].read
    given = _on(family) if given else {}
    full = json.loads(json.dumps(kind(**_on(family) if given else {}).to_dict()))
    want = model_config(read(full))
    assert model_config(read({"model_type": family, **given})) == want
    assert len(set(full) - IDLE) >= 10
    for key in full:
        if key not in given and key != "rope_parameters":  # in which the class has put what other keys say
            assert model_config(read({k: v for k, v in full.items() if k != key})) == want, key


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_key_of_a_family_is_read(family: str) -> None:
    """Another value of it is another model, or is refused; but for those that transformers reads as little."""
    kind = families.FAMILIES[family]
    base = json.loads(json.dumps(transformers.CONFIG_MAPPING[family](**_on(family)).to_dict()))
    for key in ("rope_theta", "partial_rotary_factor"):  # so that other places count
        base.get("rope_parameters", {}).pop(key, None)
    if family == "gemma3_text":
        del base["rope_parameters"]
    base |= dict.fromkeys(("layer_types", "no_rope_layers") & kind.defaults.keys())
    want = model_config(kind.read(base))
    for key in kind.defaults:
        if key in UNREAD.get(family, "").split():
            continue
        assert any(_differs(kind, {**base, key: value}, want) for value in OTHERS), key


OTHERS: tuple[Any, ...] = (
    *(3, 6, 0.5, 64, 96.0, True, False, None, "relu", "gelu", "sliding_attention", [1], ["full_attention"] * 32),
    *({"rope_type": "linear", "factor": 2.0}, {"full_attention": {"rope_theta": 7.0}}),
)
UNREAD = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe"), "original_max_position_embeddings"),
    "qwen3_moe": "original_max_position_embeddings max_window_layers layer_types",
    "gpt_neox": "original_max_position_embeddings rope_theta partial_rotary_factor",
    "olmo2": "original_max_position_embeddings",
    "smollm3": "original_max_position_embeddings max_window_layers",
    "gemma2": "original_max_position_embeddings",
    "gemma3_text": "original_max_position_embeddings partial_rotary_factor",
    "gpt_oss": "experts_per_token initial_context_length",
    "deepseek_v3": (
        "original_max_position_embeddings partial_rotary_factor aux_loss_alpha seq_aux ep_size "
        "num_nextn_predict_layers num_mtp_layers"
    ),
}


def _differs(kind: families.Family, hf: dict[str, Any], want: Any) -> bool:
    try:
        return bool(model_config(kind.read(hf)) != want)
    except (UserError, TypeError, ValueError, AttributeError):
        return True


def test_old_style_rope_scaling_reads_the_same(tmp_path: Path) -> None:
    _save("llama-linear", tmp_path)
    new = interop.load(str(tmp_path), load_params=False).config
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert interop.load(str(tmp_path), load_params=False).config == new


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "scaling beside parameters": (
        "llama",
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "the older name of the type": ("llama", {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 500.0}),
    "a factor without a type": ("llama", {"rope_scaling": {"factor": 4.0}}),
    "an empty scaling": ("llama", {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "theta in both": ("qwen2", {"rope_theta": 700.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "theta beside scaling": ("qwen3", {"rope_theta": 700.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "a part of each head": ("llama", {"partial_rotary_factor": 0.5}),
    "a part inside": ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "length outside": ("llama", {"original_max_position_embeddings": 16, "rope_scaling": YARN}),
    "mixtral's own theta": ("mixtral", {}),
    "mixtral's theta beside scaling": ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "mixtral's theta inside": ("mixtral", {"rope_parameters": {"rope_type": "default"}}),
    "neox, the newer name of the part": ("gpt_neox", {"partial_rotary_factor": 0.5}),
    "neox, its own names": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}),
    "neox, the newer name of theta": ("gpt_neox", {"rope_theta": 500.0}),
    "neox, inside": ("gpt_neox", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}}),
    "neox, scaling": ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_emb_base": 500}),
}


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_settings_wherever_they_stand(case: str) -> None:
    """Inverse frequencies and attention factor as transformers 5 computes them from the same config.json."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    family, given = ROTARY[case]
    # Heads of 64, so that a part of a head is another width.
    sizes = {**GQA, "hidden_size": 256, "head_dim": 64, "model_type": family, **given}
    if family == "gpt_neox":
        sizes = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "head_dim")}
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(sizes)))
    settings = dict(theirs.rope_parameters)
    if settings["rope_type"] == "default":
        width = int(64 * settings.get("partial_rotary_factor", 1.0))
        want, m = settings["rope_theta"] ** (-np.arange(0, width, 2) / width), 1.0
    else:
        want, m = ROPE_INIT_FUNCTIONS[settings["rope_type"]](theirs, "cpu")
    cfg = model_config(families.FAMILIES[family].read(sizes))
    rope = cfg.positions
    width = int(64 * rope.fraction)
    got, ours = rope.bind(cfg).scaling.frequencies(rope.theta, width, jnp.ones(()), cfg.max_positions)
    np.testing.assert_allclose(got, np.asarray(want), rtol=2e-6)
    assert ours == pytest.approx(m, abs=1e-6)
    if case == "scaling beside parameters":
        assert rope.scaling.factor == 4.0 and ours == pytest.approx(1.138629, abs=1e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_deepseek_v3_routing_block_equals_transformers(groups: int) -> None:
    """Its mixture layer alone: sigmoid scores, balancing bias, groups, scale, shared experts."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    experts, width, k, kept = 8, 20, 3, max(1, groups // 2)
    config = transformers.DeepseekV3Config(
        hidden_size=32,
        moe_intermediate_size=width,
        n_routed_experts=experts,
        num_local_experts=experts,
        num_experts_per_tok=k,
        n_group=groups,
        topk_group=kept,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    block = DeepseekV3MoE(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.3)
        block.gate.e_score_correction_bias.normal_(0, 0.3)
    router = {"name": "deepseek_v3", "k": k, "groups": groups, "keep_groups": kept, "scale": 2.5}
    moe = {"name": "moe", "experts": experts, "d_expert": width, "shared": 2 * width, "router": router}
    cfg = model_config({"d_model": 32, "ffn": moe})
    gate_up, down = (p.detach().numpy() for p in (block.experts.gate_up_proj, block.experts.down_proj))
    mine = {"gate": gate_up[:, :width], "up": gate_up[:, width:], "down": down}
    params = {
        "router": {
            "kernel": block.gate.weight.detach().numpy().T,
            "bias": block.gate.e_score_correction_bias.numpy(),
        },
        "experts": {n: {"kernel": w.transpose(0, 2, 1)} for n, w in mine.items()},
        "shared": {
            n: {"kernel": getattr(block.shared_experts, f"{n}_proj").weight.detach().numpy().T}
            for n in ("gate", "up", "down")
        },
    }
    x = np.random.default_rng(0).normal(size=(2, 40, 32)).astype(np.float32)
    with torch.no_grad():
        want = block(torch.from_numpy(x)).numpy()
    index = jnp.broadcast_to(jnp.arange(40), (2, 40))
    layer = LayerInputs(Tokens(index, index.astype(jnp.float32)), jnp.asarray(40.0))
    out = cfg.ffn.module(cfg).apply({"params": params}, jnp.asarray(x), layer)
    assert want.std() > 0.1 and float(out.report["sums"]["counts_E"].sum()) == 2 * 40 * k
    assert np.abs(np.asarray(out.x) - want).max() <= 2e-4


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_balance_loss_weighs_what_it_weighs_there(family: str) -> None:
    """The library's loss of one layer, times its coefficient, is ours: three choices of six experts."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    sizes = {**GQA, "model_type": family, "router_aux_loss_coef": 0.02, "num_experts_per_tok": 3}
    sizes |= {"num_local_experts": 6, "num_hidden_layers": 1}
    cfg = model_config(families.FAMILIES[family].read(sizes))
    logits = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    theirs = 0.02 * float(load_balancing_loss_func((torch.tensor(logits),), 6, 3))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = (np.argsort(-p, axis=-1)[:, :3, None] == np.arange(6)).sum(1)
    ours = cfg.ffn.load_balance_loss * 6 / 3 * float((chosen.mean(0) * p.mean(0)).sum())
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert families.FAMILIES[family].write(cfg)["router_aux_loss_coef"] == pytest.approx(0.02)
