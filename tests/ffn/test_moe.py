"""Mixtures of experts as a layer of the decoder: limits, symmetries, patterns of layers, training, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plug_case import BASE, TOKENS, PlugCase, parameters

from lm import caches
from lm import params as params_lib
from lm.config import ModelConfig, build, merge, model_config, table
from lm.decoder import Decoder
from lm.decoding import Generator
from lm.errors import UserError
from lm.ffn.grouped import grouped_dot
from lm.train import flops, step
from lm.train.config import TrainConfig


def moe(**ffn: Any) -> ModelConfig:
    return merge(BASE, {"ffn": {"name": "moe", "experts": 3, **ffn}}, "model")


class TestMoE(PlugCase):
    change = {"ffn": {"name": "moe", "experts": 3, "router": {"name": "topk", "k": 2}}}
    training_free = False


class TestDeepSeek(PlugCase):
    """Every second layer, a shared expert, and the balancing bias: two kinds of layers, one tree each."""

    change = {
        "ffn": {"name": "moe", "experts": 4, "every": 2, "shared": 16, "router": {"name": "deepseek_v3", "groups": 2}}
    }
    training_free = False


def test_one_expert_is_the_dense_layer() -> None:
    """Bit for bit: a softmax over one expert is 1."""
    dense = parameters(BASE)
    for router in ("topk", "switch"):
        cfg = moe(experts=1, router={"name": router, **({"k": 1} if router == "topk" else {})})
        tree = params_lib.init(cfg, jax.random.key(3))
        ffn = dense["blocks"]["ffn"]
        tree = {**dense, "blocks": {**dense["blocks"], "ffn": {**tree["blocks"]["ffn"]}}}
        tree["blocks"]["ffn"]["experts"] = jax.tree.map(lambda k: k[:, None], ffn)
        want = Decoder(BASE).apply({"params": dense}, jnp.asarray(TOKENS)).logits_BTV
        got = Decoder(cfg).apply({"params": tree}, jnp.asarray(TOKENS)).logits_BTV
        np.testing.assert_array_equal(got, want)


def _with_experts(tree: Any, change: Any) -> Any:
    ffn = tree["blocks"]["ffn"]
    return {**tree, "blocks": {**tree["blocks"], "ffn": change(ffn)}}


def test_equal_experts_are_one_and_their_order_is_nothing() -> None:
    cfg = moe(experts=4)
    tree = parameters(cfg)
    run = jax.jit(lambda p: Decoder(cfg).apply({"params": p}, jnp.asarray(TOKENS)).logits_BTV)
    same = _with_experts(
        tree, lambda f: {**f, "experts": jax.tree.map(lambda k: jnp.broadcast_to(k[:, :1], k.shape), f["experts"])}
    )
    dense = _with_experts(tree, lambda f: jax.tree.map(lambda k: k[:, 0], f["experts"]))
    want = Decoder(BASE).apply({"params": dense}, jnp.asarray(TOKENS)).logits_BTV
    np.testing.assert_allclose(run(same), want, rtol=0, atol=2e-5)
    p = np.array([2, 0, 3, 1])
    turned = _with_experts(
        tree,
        lambda f: {
            "router": {"kernel": f["router"]["kernel"][:, :, p]},
            "experts": jax.tree.map(lambda k: k[:, p], f["experts"]),
        },
    )
    np.testing.assert_allclose(run(turned), run(tree), rtol=0, atol=2e-5)


def test_a_bias_of_zero_is_no_bias_and_a_bias_moves_choices_only() -> None:
    plain, biased = moe(router={"name": "sigmoid"}), moe(router={"name": "deepseek_v3"})
    tree = parameters(plain)
    with_bias = _with_experts(tree, lambda f: {**f, "router": {**f["router"], "bias": jnp.zeros((2, 3))}})
    a = Decoder(plain).apply({"params": tree}, jnp.asarray(TOKENS)).logits_BTV
    b = Decoder(biased).apply({"params": with_bias}, jnp.asarray(TOKENS)).logits_BTV
    np.testing.assert_array_equal(a, b)
    all_chosen = moe(router={"name": "deepseek_v3", "k": 3})
    moved = _with_experts(with_bias, lambda f: {**f, "router": {**f["router"], "bias": f["router"]["bias"] + 0.7}})
    one, two = (Decoder(all_chosen).apply({"params": t}, jnp.asarray(TOKENS)).logits_BTV for t in (with_bias, moved))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 23), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 9))
def test_grouped_products(sizes: list[int], rest: int, width: int) -> None:
    """Both implementations, groups of any size, rows beyond the last group: against numpy, gradients included."""
    M, E, N = sum(sizes) + rest, len(sizes), 3
    if M == 0:
        return
    rng = np.random.default_rng(M + E)
    x, w, dy = rng.normal(size=(M, width)), rng.normal(size=(E, width, N)), rng.normal(size=(M, N))
    ends = np.cumsum(sizes)
    want, dx, dw = np.zeros((M, N)), np.zeros((M, width)), np.zeros((E, width, N))
    for e, (b, n) in enumerate(zip(ends, sizes, strict=True)):
        rows = slice(b - n, b)
        want[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    given_sizes = jnp.asarray(sizes, jnp.int32)
    for name in ("blocks", "ragged", "auto"):
        y, pull = jax.vjp(
            lambda x, w, name=name: grouped_dot(x, w, given_sizes, name),
            jnp.asarray(x, jnp.float32),
            jnp.asarray(w, jnp.float32),
        )
        for got, expected in zip((y, *pull(jnp.asarray(dy, jnp.float32))), (want, dx, dw), strict=True):
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


def test_reports_flow_out_of_scanned_and_unrolled_layers_alike() -> None:
    cfg = moe()
    tree = parameters(cfg)
    whole = Decoder(cfg).apply({"params": tree}, jnp.asarray(TOKENS)).reports
    apart = Decoder(cfg).apply({"params": params_lib.unstack(tree)}, jnp.asarray(TOKENS)).reports
    assert len(whole) == 2 and float(whole[0]["sums"]["counts_E"].sum()) == 2 * TOKENS.size
    assert not np.array_equal(whole[0]["sums"]["counts_E"], whole[1]["sums"]["counts_E"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, apart)
    assert Decoder(BASE).apply({"params": parameters(BASE)}, jnp.asarray(TOKENS)).reports == ({}, {})


TRAIN = build(TrainConfig, {"batch": 8, "steps": 50, "data": {"seq_len": 12}}, "train")


def rows(seed: int = 0) -> dict[str, jax.Array]:
    tokens = np.random.default_rng(seed).integers(0, 61, (8, 13))
    out = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return {k: jnp.asarray(v, jnp.int32) for k, v in out.items()} | {"weights": jnp.ones((8, 12))}


def test_the_loss_is_the_mean_over_layers_whatever_the_stack() -> None:
    cfg = moe(load_balance_loss=0.1, router_z_loss=0.01)
    tree = parameters(cfg)
    _, sums = jax.jit(lambda p, b: step.gradients(cfg, TRAIN, p, b))(tree, rows())
    none = moe(load_balance_loss=0.0)
    _, bare = jax.jit(lambda p, b: step.gradients(none, TRAIN, p, b))(tree, rows())
    reports = Decoder(cfg).apply({"params": tree}, rows()["inputs"]).reports
    extra = np.mean([float(r["loss"]) for r in reports])
    assert float(sums["loss"] - bare["loss"]) == pytest.approx(extra, rel=1e-4) and extra > 0.05
    assert float(sums["nll"]) == pytest.approx(float(bare["nll"]), rel=1e-6)


@pytest.mark.parametrize("unstacked", [False, True])
def test_the_bias_moves_against_the_load_and_by_nothing_else(unstacked: bool) -> None:
    changes = {"every": 2} if unstacked else {}
    cfg = moe(router={"name": "deepseek_v3", "bias_rate": 0.25}, load_balance_loss=0.0, **changes)
    train = dataclasses.replace(TRAIN, optimizer=dataclasses.replace(TRAIN.optimizer, decay="all"), accumulate=2)
    state = step.initial(params_lib.init(cfg, jax.random.key(0)), train, 0)

    def bias(state: Any) -> Any:
        return state["params"]["blocks_1" if unstacked else "blocks"]["ffn"]["router"]["bias"]

    run = jax.jit(lambda s, b: step.step(cfg, train, s, b))
    before = np.asarray(bias(state))
    after, metrics = run(state, rows())
    counts = np.stack([np.asarray(s["counts_E"]) for s in metrics["aux"] if s])
    want = before + 0.25 * np.sign(counts.mean(1, keepdims=True) - counts).reshape(before.shape)
    np.testing.assert_allclose(bias(after), want, rtol=0, atol=1e-6)
    assert counts.sum() == 2 * 8 * 12 * len(counts)
    bad = {**rows(), "weights": rows()["weights"].at[0, 0].set(np.nan)}
    again, metrics = run(after, bad)
    assert not bool(metrics["ok"])
    np.testing.assert_array_equal(bias(again), bias(after))  # a rejected step moves no bias


def test_the_bias_balances_a_collapsed_router() -> None:
    cfg = moe(experts=4, router={"name": "deepseek_v3", "k": 1, "bias_rate": 0.05}, load_balance_loss=0.0)
    train = build(
        TrainConfig,
        {"batch": 8, "steps": 40, "data": {"seq_len": 12}, "optimizer": {"name": "sgd", "learning_rate": 1e-9}},
        "train",
    )
    tree = params_lib.init(cfg, jax.random.key(0))
    tree = _with_experts(tree, lambda f: {**f, "router": {**f["router"], "bias": jnp.asarray([[0.5, 0, 0, 0]] * 2)}})
    state, found = step.initial(tree, train, 0), []
    run = jax.jit(lambda s, b: step.step(cfg, train, s, b))
    for i in range(40):
        state, metrics = run(state, rows(i % 4))
        found.append(float(metrics["aux"][0]["counts_E"].max()) * 4 / (8 * 12) - 1)
    assert found[0] == 3.0 and np.mean(found[-10:]) < 1.5


def test_random_routers_draw_by_seed_and_step() -> None:
    cfg = moe(router={"name": "gshard"})
    state = step.initial(parameters(cfg), TRAIN, 0)
    run = jax.jit(lambda s, b: step.step(cfg, TRAIN, s, b)[1]["loss"])
    a, b = float(run(state, rows())), float(run({**state, "seed": state["seed"] + 1}, rows()))
    later = float(run({**state, "step": state["step"] + 1}, rows()))
    assert len({a, b, later}) == 3 and a == float(run(state, rows()))


@pytest.mark.parametrize("name", [n for n, c in table("lm.ffn.routers").items() if c.learned])
def test_logits_that_are_not_numbers_are_not_hidden(name: str) -> None:
    """The step is refused, counted, and nothing moves; ten in a row end the run (tests/train/test_whole_runs.py)."""
    for change in ({}, {"capacity": 0.5} if table("lm.ffn.routers")[name].capacity else {}):
        cfg = moe(router={"name": name}, load_balance_loss=0.0, **change)
        tree = _with_experts(
            params_lib.init(cfg, jax.random.key(0)),
            lambda f: {**f, "router": {**f["router"], "kernel": f["router"]["kernel"].at[:, 0, 0].set(np.nan)}},
        )
        state = step.initial(tree, TRAIN, 0)
        after, metrics = jax.jit(lambda s, b, cfg=cfg: step.step(cfg, TRAIN, s, b))(state, rows())
        assert not bool(metrics["ok"]) and int(after["skipped"]) == 1
        jax.tree.map(np.testing.assert_array_equal, after["params"], tree)


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
    for attempt in (lambda: Generator(cfg, {}), lambda: caches.init(cfg, 1, 8)):
        with pytest.raises(UserError, match=r"model\.ffn: layer 0 cannot generate or decode with a cache") as e:
            attempt()
        assert reason in str(e.value)


@pytest.mark.parametrize("name", [n for n in table("lm.ffn.routers") if n not in ("expert_choice", "soft")])
def test_routers_that_generate_read_the_same_with_a_cache(name: str) -> None:
    cfg = moe(router={"name": name}, capacity=None if name == "hash" else 0.5)
    tree = params_lib.init(cfg, jax.random.key(1))
    want = Decoder(cfg).apply({"params": tree}, jnp.asarray(TOKENS[:, :9])).logits_BTV
    cache, got = caches.init(cfg, 2, 9), []
    for a, b in ((0, 6), (6, 7), (7, 9)):
        index = jnp.broadcast_to(jnp.arange(a, b), (2, b - a))
        out = Decoder(cfg).apply({"params": tree}, jnp.asarray(TOKENS[:, a:b]), index_BT=index, cache=cache)
        cache = out.cache
        got.append(out.logits_BTV)
    np.testing.assert_allclose(np.concatenate(got, 1), want, rtol=0, atol=1e-5)


def test_experts_that_do_not_spread_are_refused() -> None:
    place = step.Placement(8)
    place.check(moe(experts=6))  # data parallelism alone: nothing to spread

    class Mesh:
        shape = {"data": 2, "expert": 4}

    place.mesh = Mesh()  # type: ignore[assignment]
    place.check(moe(experts=8))
    place.check(model_config({}))
    with pytest.raises(
        UserError, match=r"model\.ffn\.experts: 6 experts do not spread over the 4 devices.*multiple of 4"
    ):
        place.check(moe(experts=6))


def test_hash_needs_token_ids() -> None:
    cfg = moe(router="hash")
    tree = params_lib.init(cfg, jax.random.key(0))
    with pytest.raises(ValueError, match="goes by token ids"):
        Decoder(cfg).apply({"params": tree}, embeddings_BTD=jnp.zeros((1, 4, 32)))


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
        from lm.ffn.context import Call

        call = Call(jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1, tokens), jnp.int32))
        p = jax.eval_shape(module.init, jax.random.key(0), x, call)
        run = jax.jit(lambda p, x, call: jax.grad(lambda p: module.apply(p, x, call)[0].sum())(p))
        return run.lower(p, x, call).compile().memory_analysis().temp_size_in_bytes

    base = temporary(1024, 8)
    assert temporary(4096, 8) < 4.6 * base
    assert temporary(1024, 8, k=4) < 2.2 * base
    assert temporary(1024, 8) < 0.5 * 4 * 1024 * 8 * (2 * 1024 // 8)  # float32 [T, E, C] would be twice that
