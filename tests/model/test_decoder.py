"""The decoder itself: names, axes, counts, inputs and outputs, and a float64 oracle written in numpy."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from configs.bases import llama2_7b
from lm.config import ModelConfig, merge, model_config
from lm.layer import LayerInputs, LayerOut
from lm.mixers.softmax import SoftmaxAttention
from lm.model import params as params_lib
from lm.model.decoder import Decoder, readout
from lm.model.inputs import Inputs
from lm.plug import table
from lm.watch import Watch

BASE = model_config({"vocab_size": 29, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "max_positions": 32})
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 11)))
PLAIN, STREAM = Watch(), Watch(taps=("stream",))
LLAMA = [
    "blocks/attn/k/kernel",
    "blocks/attn/o/kernel",
    "blocks/attn/q/kernel",
    "blocks/attn/v/kernel",
    "blocks/attn_norm/scale",
    "blocks/ffn/down/kernel",
    "blocks/ffn/gate/kernel",
    "blocks/ffn/up/kernel",
    "blocks/ffn_norm/scale",
    "embed",
    "final_norm/scale",
]
FULL = {
    "norm": "layernorm",
    "mixer": {"name": "softmax", "qk_norm": True, "qkv_bias": True, "out_bias": True},
    "positions": {"name": "learned", "size": 16},
    "ffn": {"name": "geglu", "bias": True},
    "head": {"name": "linear", "tie": False, "bias": True},
}


@functools.cache
def parameters(cfg: ModelConfig) -> Any:
    tree = params_lib.init(cfg, jax.random.key(0))
    return jax.tree.map(lambda x: 10 * x if x.ndim >= 3 else x, tree)


@functools.cache
def forward(cfg: ModelConfig, watch: Watch) -> Any:
    return jax.jit(lambda params, inputs: Decoder(cfg).apply({"params": params}, inputs, watch=watch))


def run(cfg: ModelConfig, tokens: Any = TOKENS, params: Any = None, watch: Watch = PLAIN, **inputs: Any) -> Any:
    return forward(cfg, watch)(parameters(cfg) if params is None else params, Inputs(tokens, **inputs))


def test_parameter_names_of_a_stacked_model() -> None:
    names = params_lib.names(params_lib.abstract(BASE))
    assert sorted(names) == LLAMA
    assert names["blocks/attn/q/kernel"].shape == (2, 16, 4, 4)
    assert names["blocks/attn/k/kernel"].shape == (2, 16, 2, 4)
    assert names["blocks/attn/o/kernel"].shape == (2, 4, 4, 16)
    assert names["blocks/ffn/down/kernel"].shape == (2, 24, 16)
    assert {str(leaf.dtype) for leaf in names.values()} == {"float32"}


def test_parameter_names_of_a_model_with_everything() -> None:
    attn = [f"blocks/attn/{p}/{leaf}" for p in "koqv" for leaf in ("bias", "kernel")]
    norms = [f"blocks/{n}/{leaf}" for n in ("attn/q_norm", "attn/k_norm", "attn_norm", "ffn_norm") for leaf in "sb"]
    ffn = [f"blocks/ffn/{p}/{leaf}" for p in ("gate", "up", "down") for leaf in ("bias", "kernel")]
    norms = [n[:-1] + {"s": "scale", "b": "bias"}[n[-1]] for n in norms]
    ends = ["embed", "pos_embed", "final_norm/scale", "final_norm/bias", "head/kernel", "head/bias"]
    names = params_lib.names(params_lib.abstract(merge(BASE, FULL, "model")))
    assert sorted(names) == sorted(attn + norms + ffn + ends)


def test_layers_of_unequal_shapes_are_kept_apart() -> None:
    cfg = merge(BASE, {"layer_overrides": [{"layers": "1", "d_ff": 8}]}, "model")
    names = params_lib.names(params_lib.abstract(cfg))
    one = [n.removeprefix("blocks/") for n in LLAMA if n.startswith("blocks/")]
    ends = [n for n in LLAMA if not n.startswith("blocks/")]
    assert sorted(names) == sorted([f"blocks_{i}/{n}" for i in (0, 1) for n in one] + ends)
    assert names["blocks_0/ffn/up/kernel"].shape == (16, 24)
    assert names["blocks_1/ffn/up/kernel"].shape == (16, 8)
    out = run(cfg, watch=STREAM)
    assert out.logits_BTV.shape == (2, 11, 29) and [x.shape for x in out.tap("stream")] == 2 * [(2, 11, 16)]


def test_unstacked_layers_compute_what_stacked_ones_do() -> None:
    """The same numbers under the other names: a unit of width 0 more changes shapes but not results."""
    cfg = merge(BASE, {"layer_overrides": [{"layers": "1", "d_ff": 25}]}, "model")
    stacked = parameters(BASE)
    apart = {k: v for k, v in stacked.items() if k != "blocks"}
    for i in range(2):
        apart[f"blocks_{i}"] = jax.tree.map(lambda p, i=i: p[i], stacked["blocks"])
    wide = {k: dict(v) for k, v in apart["blocks_1"]["ffn"].items()}
    for name in ("gate", "up"):
        wide[name]["kernel"] = jnp.pad(wide[name]["kernel"], ((0, 0), (0, 1)), constant_values=1.0)
    wide["down"]["kernel"] = jnp.pad(wide["down"]["kernel"], ((0, 1), (0, 0)))
    apart["blocks_1"] = {**apart["blocks_1"], "ffn": wide}
    np.testing.assert_allclose(run(cfg, params=apart).logits_BTV, run(BASE).logits_BTV, rtol=0, atol=1e-5)


def test_training_free_overrides_keep_the_stacked_tree() -> None:
    cfg = merge(BASE, {"layer_overrides": [{"layers": "0", "pattern": {"name": "sliding_window", "window": 2}}]}, "m")
    assert sorted(params_lib.names(params_lib.abstract(cfg))) == LLAMA
    every = merge(BASE, {"pattern": {"name": "sliding_window", "window": 2}}, "model")
    got, none, both = (run(c, params=parameters(BASE)).logits_BTV for c in (cfg, BASE, every))
    assert min(float(jnp.abs(got - x).max()) for x in (none, both)) > 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", table("lm.norms"))
@pytest.mark.parametrize("ffn", table("lm.ffn"))
def test_every_parameter_has_axes_of_its_rank(ffn: str, norm: str, bias: bool) -> None:
    changes = {
        "norm": norm,
        "ffn": {"name": ffn, "shared": 3, "shared_gate": bias} if ffn == "moe" else {"name": ffn, "bias": bias},
        "mixer": {"name": "softmax", "qk_norm": bias, "qkv_bias": bias, "out_bias": not bias},
        "positions": {"name": "learned", "size": 8} if bias else "rope",
        "head": {"name": "linear", "tie": not bias, "bias": bias},
    }
    for more in ({}, {"layer_overrides": [{"layers": "0", "d_ff": 5}]}):
        cfg = merge(BASE, {**changes, **more}, "model")
        axes = params_lib.axes(cfg)
        for path, leaf in params_lib.names(params_lib.abstract(cfg)).items():
            found = axes[path]
            assert len(found) == leaf.ndim, path
            assert (found[0] == "layers") == path.startswith("blocks/"), path
            size = {"embed": 16, "vocab": 29, "head_dim": 4, "heads": 4, "kv_heads": 2, "layers": 2, "positions": 8}
            assert all(n == size.get(a, n) for a, n in zip(found, leaf.shape, strict=True)), path


class Undeclared(nn.Module):
    cfg: Any

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, cache: Any) -> LayerOut:
        return LayerOut(x * self.param("kernel2", nn.initializers.ones, (x.shape[-1],)))


@dataclasses.dataclass(frozen=True)
class Careless(SoftmaxAttention):
    def module(self, cfg: Any, name: str | None = None) -> nn.Module:
        return Undeclared(cfg, name=name)


def test_a_parameter_without_axes_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="blocks/attn/kernel2"):
        params_lib.axes(dataclasses.replace(BASE, mixer=Careless()))


def test_llama_2_7b_has_its_published_size() -> None:
    cfg = model_config(llama2_7b.model())
    V, D, L, F = cfg.vocab_size, cfg.d_model, cfg.n_layers, cfg.d_ff
    closed = 2 * V * D + L * (4 * D * D + 3 * D * F + 2 * D) + D
    assert params_lib.count(params_lib.abstract(cfg)) == closed == 6_738_415_616


def test_gpt2_small_has_its_published_size() -> None:
    cfg = model_config(
        {
            "vocab_size": 50257,
            "d_model": 768,
            "n_layers": 12,
            "n_heads": 12,
            "d_ff": 3072,
            "norm": "layernorm",
            "mixer": {"name": "softmax", "qkv_bias": True, "out_bias": True},
            "positions": {"name": "learned", "size": 1024},
            "ffn": {"name": "gelu_tanh", "bias": True},
        }
    )
    assert params_lib.count(params_lib.abstract(cfg)) == 124_439_808


def _rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def _numpy_decoder(params: Any, tokens: np.ndarray, parallel: bool) -> np.ndarray:
    """Logits ``[T, V]`` of one row of the baseline, step by step in float64."""
    p: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["embed"][tokens]
    for i in range(2):
        b = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        h = _rms(x, b["attn_norm"]["scale"])
        q, k, v = (np.einsum("td,dhc->thc", h, b["attn"][n]["kernel"]) for n in "qkv")
        heads = oracles.attention(q, k, v, lambda t, h: [(j, float(t - j)) for j in range(t + 1)])
        mixed = np.einsum("thc,hcd->td", heads, b["attn"]["o"]["kernel"])
        h = _rms(x if parallel else x + mixed, b["ffn_norm"]["scale"])
        gate = h @ b["ffn"]["gate"]["kernel"]
        x = x + mixed + (gate / (1 + np.exp(-gate)) * (h @ b["ffn"]["up"]["kernel"])) @ b["ffn"]["down"]["kernel"]
    return _rms(x, p["final_norm"]["scale"]) @ p["embed"].T


@pytest.mark.parametrize("parallel", [False, True])
def test_the_baseline_in_numpy(parallel: bool) -> None:
    cfg = dataclasses.replace(BASE, parallel_residual=parallel)
    params = parameters(BASE)
    params = {**params, "final_norm": {"scale": jnp.linspace(0.5, 2.0, 16)}}
    got = run(cfg, params=params).logits_BTV
    assert got.dtype == jnp.float32
    for row in range(2):
        want = _numpy_decoder(params, np.asarray(TOKENS[row]), parallel)
        np.testing.assert_allclose(got[row], want, rtol=0, atol=2e-5)


def test_layer_norm_bias_and_scale_in_numpy() -> None:
    x = np.random.default_rng(0).normal(2.0, 3.0, (4, 16))
    scale, bias = np.linspace(0.5, 2.0, 16), np.linspace(-1.0, 1.0, 16)
    for name, want in (
        ("layernorm", (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias),
        ("rmsnorm", _rms(x, scale)),
    ):
        params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
        if name == "rmsnorm":
            del params["bias"]
        got = table("lm.norms")[name]().module("float32").apply({"params": params}, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        half = table("lm.norms")[name]().module("float32").apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
        assert half.dtype == jnp.bfloat16


def test_taps_are_the_residual_stream() -> None:
    out = run(BASE, watch=STREAM)
    assert [x.shape for x in out.tap("stream")] == 2 * [(2, 11, 16)]
    last = BASE.norm.module("float32").apply({"params": parameters(BASE)["final_norm"]}, out.tap("stream")[-1])
    np.testing.assert_allclose(last, out.hidden_BTD, rtol=0, atol=1e-6)
    unrolled = run(dataclasses.replace(BASE, scan_layers=False), watch=STREAM)
    np.testing.assert_allclose(unrolled.tap("stream"), out.tap("stream"), rtol=0, atol=1e-5)
    assert run(BASE).tap("stream") == []
    # The first tap is what the model with its second block silenced ends in.
    silent = jax.tree.map(lambda p: p.at[1].set(0.0), parameters(BASE)["blocks"])
    shorter = run(BASE, params={**parameters(BASE), "blocks": silent}, watch=STREAM)
    np.testing.assert_allclose(shorter.tap("stream")[1], out.tap("stream")[0], rtol=0, atol=1e-6)


def test_embeddings_in_place_of_tokens() -> None:
    for scale in (1.0, 4.0):
        cfg = dataclasses.replace(BASE, embed_scale=scale)
        looked_up = parameters(BASE)["embed"][TOKENS]
        got = run(cfg, None, parameters(BASE), embeddings_BTD=looked_up).logits_BTV
        np.testing.assert_array_equal(got, run(cfg, params=parameters(BASE)).logits_BTV)


def test_hidden_states_and_the_head_alone() -> None:
    for head in ({"tie": True}, {"tie": False, "bias": True, "softcap": 2.0}):
        cfg = merge(BASE, {"head": head}, "model")
        params = parameters(cfg)
        if head.get("bias"):
            params = {**params, "head": {**params["head"], "bias": jnp.linspace(-5.0, 5.0, 29)}}
        whole, without = run(cfg, params=params), run(cfg, params=params, watch=Watch(logits=False))
        assert without.logits_BTV is None
        np.testing.assert_array_equal(without.hidden_BTD, whole.hidden_BTD)
        np.testing.assert_allclose(readout(cfg, params, whole.hidden_BTD), whole.logits_BTV, rtol=0, atol=1e-6)
        if "softcap" in head:
            assert 1.9 < float(jnp.abs(whole.logits_BTV).max()) <= 2.0


def test_default_inputs_are_the_documented_ones() -> None:
    want = run(BASE).logits_BTV
    index = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), (2, 11))
    for inputs in (
        {"index_BT": index},
        {"positions_BT": index.astype(jnp.float32)},
        {"segments_BT": jnp.full((2, 11), 3)},
        {"index_BT": index, "positions_BT": index + 7.0},
    ):
        np.testing.assert_allclose(run(BASE, **inputs).logits_BTV, want, rtol=0, atol=1e-5)
    moved = run(BASE, positions_BT=2.0 * index).logits_BTV
    assert float(jnp.abs(moved - want).max()) > 1e-3
    half = merge(BASE, {"positions": {"scaling": {"name": "linear", "factor": 2.0}}}, "model")
    np.testing.assert_allclose(run(half, params=parameters(BASE), positions_BT=2.0 * index).logits_BTV, want, atol=1e-5)


def test_packed_documents_count_from_their_own_start() -> None:
    """Segments alone say where documents start; any ids that differ from their neighbour's do."""
    segments = jnp.asarray([[4, 4, 4, 1, 1, 1, 1, 9, 9, 9, 9], [2] * 10 + [0]])
    index = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3], [*range(10), 0]], jnp.int32)
    for cfg in (merge(BASE, {"pattern": {"name": "streaming", "window": 2, "sinks": 1}}, "model"), BASE):
        params = parameters(BASE)
        got = run(cfg, params=params, segments_BT=segments).logits_BTV
        np.testing.assert_array_equal(
            got, run(cfg, params=params, segments_BT=segments, index_BT=index, positions_BT=index * 1.0).logits_BTV
        )
    np.testing.assert_allclose(got[0, 3:7], run(BASE, TOKENS[:1, 3:7]).logits_BTV[0], rtol=0, atol=1e-5)


def test_learned_positions_are_rows_of_the_table() -> None:
    cfg = merge(BASE, {"positions": {"name": "learned", "size": 8}}, "model")
    params = parameters(cfg)
    at = jnp.asarray([[0.0, 3.0, 3.9, 7.0, 8.0, 100.0]] * 2)
    got = run(cfg, TOKENS[:, :6], positions_BT=at).logits_BTV
    rows = params["embed"][TOKENS[:, :6]] + params["pos_embed"][jnp.asarray([0, 3, 3, 7, 7, 7])]
    nope = merge(BASE, {"positions": "nope"}, "model")
    rest = {k: v for k, v in params.items() if k != "pos_embed"}
    np.testing.assert_allclose(run(nope, None, rest, embeddings_BTD=rows).logits_BTV, got, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_progress_is_called_after_every_layer(scan: bool) -> None:
    calls: list[int] = []
    cfg = dataclasses.replace(BASE, n_layers=3, scan_layers=scan)
    params = jax.tree.map(lambda p: p[jnp.asarray([0, 1, 0])], parameters(BASE)["blocks"])
    watch = Watch(logits=False, on_layer=lambda: calls.append(1))
    run(cfg, params={**parameters(BASE), "blocks": params}, watch=watch).hidden_BTD.block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "either tokens_BT or embeddings_BTD"),
        ({"tokens_BT": TOKENS, "embeddings_BTD": jnp.zeros((2, 11, 16))}, "either tokens_BT or embeddings_BTD"),
        ({"tokens_BT": TOKENS, "cache": ()}, "index_BT is needed"),
        ({"tokens_BT": TOKENS, "cache": (), "index_BT": TOKENS, "segments_BT": TOKENS}, "not supported"),
        ({"tokens_BT": TOKENS, "ancestors_BTT": TOKENS}, "read behind a cache, with commit=False"),
        ({"tokens_BT": TOKENS, "index_BT": TOKENS, "ancestors_BTT": TOKENS, "cache": ()}, "with commit=False"),
        ({"tokens_BT": TOKENS, "commit": False}, "no cache that could keep the tokens"),
    ],
)
def test_calls_that_mean_nothing_are_refused(inputs: Any, text: str) -> None:
    cache, commit = inputs.pop("cache", None), inputs.pop("commit", True)
    with pytest.raises(ValueError, match=text):
        Decoder(BASE).apply({"params": parameters(BASE)}, Inputs(**inputs), cache, PLAIN, commit)


def test_initial_values() -> None:
    cfg = dataclasses.replace(BASE, d_model=64, head_dim=16, d_ff=128, init_std=0.5)
    draw = jax.jit(lambda rng: params_lib.init(cfg, rng))
    one, again, other = (params_lib.names(draw(jax.random.key(seed))) for seed in (1, 1, 2))
    assert float(one["blocks/ffn/up/kernel"].std()) == pytest.approx(0.5, rel=0.03)
    assert not np.allclose(one["blocks/ffn/up/kernel"][0], one["blocks/ffn/up/kernel"][1])
    assert bool((one["final_norm/scale"] == 1.0).all())
    assert all(bool((one[n] == again[n]).all()) for n in one)
    assert not np.allclose(one["embed"], other["embed"])
    # A plug without parameters leaves the draw what it was.
    same = params_lib.names(params_lib.init(merge(cfg, {"pattern": "streaming"}, "model"), jax.random.key(1)))
    assert all(bool((one[n] == same[n]).all()) for n in one)


def test_compute_type_and_parameter_type_are_separate() -> None:
    cfg = dataclasses.replace(BASE, dtype="bfloat16")
    out = run(cfg, params=parameters(BASE))
    assert out.hidden_BTD.dtype == jnp.bfloat16 and out.logits_BTV.dtype == jnp.float32
    assert {str(x.dtype) for x in jax.tree.leaves(params_lib.abstract(cfg))} == {"float32"}
    stored = params_lib.abstract(dataclasses.replace(BASE, param_dtype="bfloat16"))
    assert {str(x.dtype) for x in jax.tree.leaves(stored)} == {"bfloat16"}


def test_attention_scale() -> None:
    """Queries doubled and the scale halved is the same model."""
    params = parameters(BASE)
    attn = params["blocks"]["attn"]
    blocks = {**params["blocks"], "attn": {**attn, "q": {"kernel": 2 * attn["q"]["kernel"]}}}
    cfg = merge(BASE, {"mixer": {"scale": 0.5 / math.sqrt(4)}}, "model")
    got = run(cfg, params={**params, "blocks": blocks}).logits_BTV
    np.testing.assert_allclose(got, run(BASE).logits_BTV, rtol=0, atol=1e-5)


def test_one_tree_per_layer_is_the_stack() -> None:
    apart = params_lib.unstack(parameters(BASE))
    assert {f"blocks_{i}" for i in range(BASE.n_layers)} < set(apart) and "blocks" not in apart
    assert params_lib.unstack(apart) is apart
    assert params_lib.count(apart) == params_lib.count(parameters(BASE))
    axes = jax.tree.leaves(params_lib.axes(BASE).tree(apart), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in axes] == [leaf.ndim for leaf in jax.tree.leaves(apart)]
    np.testing.assert_allclose(run(BASE, params=apart).logits_BTV, run(BASE).logits_BTV, atol=1e-6)
