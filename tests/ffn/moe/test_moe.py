"""Mixtures of experts as a layer of the decoder: limits, symmetries, patterns of layers, training, refusals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import BASE, TOKENS, densified, forward, logits, parameters
from cases.plug_case import PlugCase

from lm import caches, weights
from lm.attention.branches import Tokens
from lm.config import ModelConfig, build, merge
from lm.decoding import Generator
from lm.errors import UserError
from lm.ffn.glu import SwiGLU
from lm.ffn.moe.grouped import mixture
from lm.layer import LayerInputs
from lm.model import params as params_lib
from lm.model import reports
from lm.model.decoder import Decoder
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.plug import table
from lm.surgery.int8 import Int8
from lm.surgery.lora import LoRA
from lm.train import flops, step
from lm.train.config import TrainConfig
from lm.train.placement import Placement


def moe(**ffn: Any) -> ModelConfig:
    return merge(BASE, {"ffn": {"name": "moe", "experts": 3, **ffn}}, "model")


class TestMoE(PlugCase):
    """Groups of experts, a balancing bias, and a shared expert."""

    change = {"ffn": {"name": "moe", "experts": 4, "shared": 16, "router": {"name": "deepseek_v3", "groups": 2}}}
    training_free = False


class TestClampedExperts(PlugCase):
    """Experts and a router with biases, and an activation with settings (gpt-oss)."""

    change = {
        "ffn": {
            "name": "moe",
            "experts": 4,
            "expert": "clamped_swiglu",
            "expert_settings": {"bias": True, "limit": 0.5},
            "router": {"name": "topk", "offset": True},
        }
    }
    training_free = False


def test_one_expert_is_the_dense_layer() -> None:
    """Bit for bit: a softmax over one expert is 1."""
    dense = parameters(BASE)
    want = logits(BASE, tokens_BT=TOKENS)
    for router in ("topk", "switch"):
        cfg = moe(experts=1, router={"name": router, **({"k": 1} if router == "topk" else {})})
        ffn = {**params_lib.init(cfg, jax.random.key(3))["blocks"]["ffn"]}
        ffn["experts"] = jax.tree.map(lambda k: k[:, None], dense["blocks"]["ffn"])
        tree = {**dense, "blocks": {**dense["blocks"], "ffn": ffn}}
        np.testing.assert_array_equal(logits(cfg, tree, tokens_BT=TOKENS), want)


def _with_experts(tree: Any, change: Any) -> Any:
    ffn = tree["blocks"]["ffn"]
    return {**tree, "blocks": {**tree["blocks"], "ffn": change(ffn)}}


@functools.cache
def _pulled(name: str, gated: bool, biased: bool) -> Any:
    def run(x: Any, weights: Any, gates: Any, dy: Any, order: Any, sizes: Any) -> Any:
        place = jnp.argsort(order).reshape(gates.shape)
        y, pull = jax.vjp(lambda x, w, g: mixture(x, w, g, order, place, sizes, SwiGLU(), name), x, weights, gates)
        return y, *pull(dy)

    return jax.jit(run)


def _loop(x: Any, weights: Any, gates: Any, experts: Any) -> Any:
    """An assignment at a time; those of expert -1 are nobody's."""
    rows = []
    for n in range(x.shape[0]):
        row = jnp.zeros(x.shape[1])
        for j in range(gates.shape[1]):
            if (e := experts[n][j]) >= 0:

                def product(name: str, n: int = n, e: int = e) -> Any:
                    bias = weights[f"{name}_bias"][e] if f"{name}_bias" in weights else 0.0
                    return x[n] @ weights[name][e] + bias

                up = product("up")
                inner = jax.nn.silu(product("gate")) * up if "gate" in weights else jax.nn.silu(up)
                row += gates[n, j] * (inner @ weights["down"][e])
        rows.append(row)
    return jnp.stack(rows)


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize(
    "sizes", [(0, 0, 0, 0, 0), (0, 42, 0, 0, 0), (8, 8, 8, 8, 10), (1, 17, 0, 9, 3), (0, 0, 3, 0, 20)]
)
def test_rows_through_their_experts(sizes: tuple[int, ...], gated: bool, biased: bool) -> None:
    """Every implementation, groups of any size, rows that are nobody's: against a loop, gradients included."""
    N, k, E, D, F = 21, 2, len(sizes), 6, 3
    rng = np.random.default_rng(sum(sizes))
    shapes: dict[str, tuple[int, ...]] = {"up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)}
    shapes |= {"up_bias": (E, F), "gate_bias": (E, F)} if biased else {}
    names = [n for n in shapes if gated or not n.startswith("gate")]
    weights = {n: jnp.asarray(rng.normal(size=shapes[n]), jnp.float32) for n in names}
    x, dy, gates = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (N, D), (N, k)))
    order = rng.permutation(N * k).astype(np.int32)
    experts = np.full(N * k, -1)
    experts[order[: sum(sizes)]] = np.repeat(np.arange(E), sizes)
    want, pull = jax.vjp(lambda x, w, g: _loop(x, w, g, experts.reshape(N, k)), x, weights, gates)
    wanted = want, *pull(dy)
    for name in ("blocks", "ragged", "auto"):
        made = _pulled(name, gated, biased)(x, weights, gates, dy, jnp.asarray(order), jnp.asarray(sizes, jnp.int32))
        for got, expected in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4, err_msg=name)


def test_layers_by_pattern() -> None:
    cfg = merge(BASE, {"n_layers": 7, "ffn": {"name": "moe", "every": 2, "first_dense": 2, "dense": "geglu"}}, "model")
    names = [next(n for n, c in table("lm.ffn").items() if c is type(layer.ffn)) for layer in cfg.layers()]
    assert names == ["geglu", "geglu", "geglu", "moe", "geglu", "moe", "geglu"]
    tree = params_lib.abstract(cfg)
    assert "experts" in tree["blocks_3"]["ffn"] and "experts" not in tree["blocks_2"]["ffn"]
    whole = merge(BASE, {"n_layers": 7, "ffn": {"name": "moe"}}, "model")
    assert params_lib.abstract(whole)["blocks"]["ffn"]["experts"]["up"]["kernel"].shape[:2] == (7, 8)
    override = merge(whole, {"layer_overrides": ({"layers": "0", "ffn": "swiglu"},)}, "model")
    assert "experts" not in params_lib.abstract(override)["blocks_0"]["ffn"]


REPORTING = moe(load_balance_loss=0.1, router_z_loss=0.01)


def test_reports_flow_out_of_scanned_and_unrolled_layers_alike() -> None:
    tree, tokens = parameters(REPORTING), jnp.asarray(TOKENS)
    whole = forward(REPORTING)(tree, tokens_BT=tokens).reports
    apart = forward(REPORTING)(params_lib.unstack(tree), tokens_BT=tokens).reports
    assert len(whole) == 2 and float(whole[0]["sums"]["counts_E"].sum()) == 2 * TOKENS.size
    assert not np.array_equal(whole[0]["sums"]["counts_E"], whole[1]["sums"]["counts_E"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, apart)
    assert forward(BASE)(parameters(BASE), tokens_BT=tokens).reports == ({}, {})


TRAIN = build(TrainConfig, {"batch": 8, "steps": 50, "data": {"seq_len": 12}}, "train")


def rows(seed: int = 0) -> dict[str, jax.Array]:
    tokens = np.random.default_rng(seed).integers(0, 61, (8, 13))
    out = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return {k: jnp.asarray(v, jnp.int32) for k, v in out.items()} | {"weights": jnp.ones((8, 12))}


def test_the_loss_is_the_mean_over_layers() -> None:
    tree, tokens = parameters(REPORTING), jnp.asarray(TOKENS)
    weights_BT = jnp.ones(TOKENS.shape).at[0, :7].set(0)
    batch = {"inputs": tokens, "targets": jnp.roll(tokens, -1, 1), "weights": weights_BT}
    total, sums = jax.jit(lambda p, b: step.objective(REPORTING, TRAIN, p, b))(tree, batch)
    extra = np.mean([float(r["loss"]) for r in forward(REPORTING)(tree, tokens_BT=tokens).reports])
    n = float(weights_BT.sum())
    assert float(sums["weight"]) == n and extra > 0.05
    assert float(total - sums["nll"]) / n == pytest.approx(extra, rel=1e-3)
    own = reports.add([({}, {"loss": jnp.float32(3)}, {"loss": jnp.float32(1)})], jnp.float32(5), {"weight": 4.0})
    assert float(own[0]) == 5 + 4 * 2 and own[1] == {"weight": 4.0}


def test_the_bias_moves_against_the_load_and_by_nothing_else() -> None:
    cfg = moe(router={"name": "deepseek_v3", "bias_rate": 0.25}, load_balance_loss=0.0)
    train = dataclasses.replace(TRAIN, optimizer=dataclasses.replace(TRAIN.optimizer, decay="all"), accumulate=2)
    state = step.initial(cfg, train, params_lib.init(cfg, jax.random.key(0)), 0)

    def bias(state: Any) -> np.ndarray:
        return np.asarray(state["params"]["blocks"]["ffn"]["router"]["bias"])

    run = jax.jit(lambda s, b: step.step(cfg, train, s, b))
    after, metrics = run(state, rows())
    counts = np.stack([np.asarray(s["counts_E"]) for s in metrics["aux"]])
    want = bias(state) + 0.25 * np.sign(counts.mean(1, keepdims=True) - counts)
    np.testing.assert_allclose(bias(after), want, rtol=0, atol=1e-6)
    assert counts.sum() == 2 * 8 * 12 * 2
    bad = {**rows(), "weights": rows()["weights"].at[0, 0].set(np.nan)}
    again, metrics = run(after, bad)
    assert not bool(metrics["ok"])
    np.testing.assert_array_equal(bias(again), bias(after))  # a rejected step moves no bias

    # the same with one tree per layer, and a mean that stays 0
    apart = moe(every=2, router={"name": "deepseek_v3", "bias_rate": 0.25, "centre": True})
    old = params_lib.init(apart, jax.random.key(0))
    new = jax.tree.map(lambda x: x + 1, old)
    moved = reports.apply_rule_updates(apart, old, new, ({}, {"counts_E": jnp.array([9.0, 1.0, 2.0])}))
    bias_E = moved["blocks_1"]["ffn"]["router"].pop("bias")
    np.testing.assert_allclose(bias_E, 0.25 * (np.array([-1, 1, 1]) - 1 / 3), atol=1e-6)
    new["blocks_1"]["ffn"]["router"].pop("bias")
    jax.tree.map(np.testing.assert_array_equal, moved, new)


@functools.cache
def train_step(cfg: ModelConfig) -> Any:
    return jax.jit(lambda s, b: step.step(cfg, TRAIN, s, b))


def test_random_routers_draw_by_seed_and_step() -> None:
    cfg = moe(router={"name": "gshard"})
    state = step.initial(cfg, TRAIN, parameters(cfg), 0)
    changes: tuple[dict[str, Any], ...] = ({}, {"seed": state["seed"] + 1}, {"step": state["step"] + 1}, {})
    a, b, later, again = (float(train_step(cfg)({**state, **c}, rows())[1]["loss"]) for c in changes)
    assert len({a, b, later}) == 3 and a == again


def test_a_step_whose_router_gives_no_numbers_is_refused() -> None:
    """Counted, and nothing moves; ten in a row end the run (tests/train/test_whole_runs.py)."""
    cfg = moe(router={"name": "gshard"})
    tree = _with_experts(
        params_lib.init(cfg, jax.random.key(0)),
        lambda f: {**f, "router": {"kernel": f["router"]["kernel"].at[:, 0, 0].set(np.nan)}},
    )
    state = step.initial(cfg, TRAIN, tree, 0)
    after, metrics = train_step(cfg)(state, rows())
    assert not bool(metrics["ok"]) and int(after["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])


def test_adapters_and_int8_on_a_mixture() -> None:
    """Adapters fit experts, router and shared expert and are the merged model; int8 leaves experts and router."""
    cfg = TestMoE().cfg
    tree = parameters(cfg)
    lora = LoRA(targets=("*/ffn/*kernel",), rank=2)
    adapters = lora.init(cfg, tree, jax.random.key(1))
    assert adapters["blocks"]["ffn"]["experts"]["up"]["kernel"]["lora_a"].shape == (2, 4, 32, 2)
    want = logits(cfg, tokens_BT=TOKENS)
    np.testing.assert_array_equal(logits(cfg, lora.attach(cfg, tree, adapters), tokens_BT=TOKENS), want)
    train = dataclasses.replace(TRAIN, surgery=lora)
    state = step.initial(cfg, train, adapters, 0)
    after, metrics = jax.jit(lambda s, b: step.step(cfg, train, s, b, step.Beside(tree)))(state, rows())
    assert bool(metrics["ok"]) and jax.tree.structure(after["params"]) == jax.tree.structure(adapters)
    moved = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), after["params"])
    merged = logits(cfg, lora.merge(cfg, tree, moved), tokens_BT=TOKENS)
    assert np.abs(merged - want).max() > 0.01
    np.testing.assert_allclose(logits(cfg, lora.attach(cfg, tree, moved), tokens_BT=TOKENS), merged, atol=2e-5)

    _, made = Int8().apply(cfg, tree)
    rounded = {
        n.split("/", 1)[1] for n, leaf in params_lib.names(made).items() if weights.special(leaf) and "/ffn/" in n
    }
    assert rounded == {f"ffn/shared/{n}/kernel" for n in ("gate", "up", "down")}
    got, want = (logits(cfg, t, tokens_BT=TOKENS) for t in (made, densified(made)))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_flops_count_what_a_token_passes() -> None:
    dense = merge(BASE, {"d_ff": 96}, "model")
    mixture = merge(
        BASE, {"ffn": {"name": "moe", "experts": 8, "d_expert": 48, "router": {"name": "topk", "k": 2}}}, "model"
    )
    router = 6 * 2 * 32 * 8
    assert flops.per_token(mixture, 16) == pytest.approx(flops.per_token(dense, 16) + router)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"experts": 2, "router": {"name": "topk", "k": 3}}, "router.k: found 3; valid: 1 to model.ffn.experts = 2"),
    "k 0": ({"router": {"name": "topk", "k": 0}}, "router.k: found 0"),
    "gshard alone": ({"experts": 1, "router": "gshard"}, "router.k: found 2"),
    "capacity": ({"capacity": 0.0}, "capacity: must be positive"),
    "eval capacity": ({"eval_capacity": -1.0}, "eval_capacity: must be positive"),
    "no experts": ({"experts": 0}, "experts: must be at least 1"),
    "router": ({"router": "swich"}, "did you mean 'switch'"),
    "softmax": ({"router": {"name": "topk", "softmax": "affter"}}, "did you mean 'after'"),
    "groups": ({"experts": 6, "router": {"name": "deepseek_v3", "groups": 4}}, "valid: 1, 2, 3, 6"),
    "too few groups": (
        {"experts": 6, "router": {"name": "deepseek_v3", "groups": 6, "k": 2}},
        "router.k: 2 experts of 1 groups of 1",
    ),
    "capacity of slots": ({"capacity": 1.0, "router": "soft"}, "router 'soft' takes None only"),
    "buffers": ({"dispatch": "buffers"}, "set model.ffn.capacity"),
    "hash": ({"router": {"name": "hash", "vocab": 50257}}, "the table is for 50257 ids, model.vocab_size is 61"),
    "expert": ({"expert": "moe"}, "unknown name 'moe'"),
    "dense": ({"dense": "moe"}, "dense: found moe"),
    "gate of nothing": ({"shared_gate": True}, "no shared expert"),
    "loss": ({"load_balance_loss": -1.0}, "load_balance_loss: must be finite"),
    "priority": ({"priority": "order"}, "priority: unknown name 'order'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_before_anything_is_built(case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(UserError) as e:
        moe(**change)
    assert str(e.value).startswith("model.ffn.") and message in str(e.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"router": "expert_choice"}, "router 'expert_choice' chooses by comparing a token with later ones"),
        ({"router": "soft"}, "router 'soft' chooses by comparing"),
        ({"router": {"name": "sinkhorn", "evaluation": "balanced"}}, "valid: model.ffn.router.evaluation = argmax"),
        ({"router": {"name": "base", "evaluation": "balanced"}}, "valid: model.ffn.router.evaluation = argmax"),
        ({"eval_capacity": 2.0}, "drops tokens by what else is in the group"),
    ],
)
def test_generation_that_would_be_wrong_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    cfg = moe(**change)
    for attempt in (lambda: Generator(DecoderModel(cfg), {}), lambda: caches.init(cfg, 1, 8)):
        with pytest.raises(UserError, match=r"model\.ffn: layer 0 cannot generate or decode with a cache") as e:
            attempt()
        assert reason in str(e.value)


def test_experts_that_do_not_spread_are_refused() -> None:
    train = build(TrainConfig, {"batch": 8, "mesh": {"data": 2, "expert": 4}}, "train")
    Placement(moe(experts=8), train)
    Placement(BASE, train)  # no experts: the axis has rows alone
    said = (
        r"axis 1 of blocks/ffn/experts/down/kernel \(experts, 6\) does not divide by 4 \(expert 4\); valid: 1, 2, 3, 6"
    )
    with pytest.raises(UserError, match=said):
        Placement(moe(experts=6), train)


def test_hash_needs_token_ids() -> None:
    cfg = moe(router="hash")
    tree = params_lib.init(cfg, jax.random.key(0))
    with pytest.raises(ValueError, match="goes by token ids"):
        Decoder(cfg).apply({"params": tree}, Inputs(embeddings_BTD=jnp.zeros((1, 4, 32))))


def test_dispatch_holds_memory_in_proportion_to_tokens() -> None:
    """No array of tokens x experts x places: doubling the tokens doubles the temporary memory, more experts cost
    little."""

    def temporary(tokens: int, experts: int, k: int = 2) -> float:
        cfg = merge(
            BASE,
            {"ffn": {"name": "moe", "experts": experts, "d_expert": 16, "router": {"name": "topk", "k": k}}},
            "model",
        )
        module = cfg.ffn.module(cfg)
        x = jax.ShapeDtypeStruct((1, tokens, 32), jnp.float32)
        ids, positions = (jax.ShapeDtypeStruct((1, tokens), kind) for kind in (jnp.int32, jnp.float32))
        layer = LayerInputs(Tokens(ids, positions), jax.ShapeDtypeStruct((), jnp.float32), ids)  # type: ignore[arg-type]
        p = jax.eval_shape(module.init, jax.random.key(0), x, layer)
        run = jax.jit(lambda p, x, layer: jax.grad(lambda p: module.apply(p, x, layer).x.sum())(p))
        return run.lower(p, x, layer).compile().memory_analysis().temp_size_in_bytes

    base = temporary(1024, 8)
    assert temporary(4096, 8) < 4.6 * base
    assert temporary(1024, 8, k=4) < 2.2 * base
    assert temporary(1024, 8) < 0.5 * 4 * 1024 * 8 * (2 * 1024 // 8)  # float32 [T, E, C] would be twice that
