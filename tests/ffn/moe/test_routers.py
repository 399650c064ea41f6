"""Every router and both dispatches against loops over tokens; which routers leak; balance, drops and losses."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import moe_reference as ref
import numpy as np
import pytest

from lm.attention.branches import Tokens
from lm.config import ModelConfig, merge, model_config
from lm.errors import UserError
from lm.ffn.moe.plug import MoE
from lm.ffn.moe.routers import Hash
from lm.ffn.moe.routing import TokenChoice, balanced_assignment, limit, sinkhorn
from lm.layer import LayerInputs
from lm.model.taps import named
from lm.plug import table
from lm.watch import Watch

E, T, D, F, V = 6, 26, 8, 10, 40
BASE = model_config({"vocab_size": V, "d_model": D, "n_heads": 1, "d_ff": F})
X = np.random.default_rng(0).normal(size=(T, D))
IDS = np.random.default_rng(1).integers(0, V, T)
KEY = jax.random.key(7)
LIMITED: dict[str, Any] = {"capacity": 0.5, "eval_capacity": 0.5}


def model(**ffn: Any) -> ModelConfig:
    return merge(BASE, {"ffn": {"name": "moe", "experts": E, **ffn}}, "model")


def inputs(index_BT: Any, ids_BT: Any, key: Any = None) -> LayerInputs:
    """What the layer may look at; all that it hands out is watched."""
    index, ids = (jnp.asarray(a, jnp.int32) for a in (index_BT, ids_BT))
    return LayerInputs(Tokens(index, index.astype(jnp.float32)), jnp.ones(()), ids, key, Watch(("*",)))


def moe(cfg: ModelConfig) -> MoE:
    """The mixture of a model."""
    assert isinstance(cfg.ffn, MoE)
    return cfg.ffn


@functools.cache
def shapes_of(cfg: ModelConfig) -> Any:
    layer = inputs(np.zeros((1, 1)), np.zeros((1, 1)))
    return jax.eval_shape(cfg.ffn.module(cfg).init, jax.random.key(0), jnp.zeros((1, 1, D)), layer)["params"]


@functools.cache
def program(cfg: ModelConfig) -> Any:
    """Jitted ``(params, x[B, T, D], layer) -> (y, report)``, what was watched being ``report["taps"]``; the tests of
    this file share it."""

    def run(p: Any, x: jax.Array, layer: LayerInputs) -> tuple[jax.Array, Any]:
        out, made = cfg.ffn.module(cfg).apply({"params": p}, x, layer, mutable=["taps"])
        return out.x, {**out.report, "taps": named(made["taps"])}

    return jax.jit(run)


def weights(cfg: ModelConfig, seed: int = 0) -> Any:
    """Parameters of the layer, large enough that choices are clear, and the experts as functions on float64 rows."""
    shapes = shapes_of(cfg)
    rng = np.random.default_rng(seed)
    p = jax.tree.map(lambda s: np.asarray(rng.normal(0, 0.6, s.shape), np.float32), shapes)
    stacks = p["experts"]

    def expert(e: int) -> Any:
        gate, up, down = (stacks[n]["kernel"][e].astype(np.float64) for n in ("gate", "up", "down"))
        return lambda x: (x @ gate * ref.sigmoid(x @ gate) * (x @ up)) @ down

    return p, [expert(e) for e in range(len(stacks["up"]["kernel"]))]


def run(cfg: ModelConfig, p: Any, x: np.ndarray = X, key: Any = None, ids: Any = IDS, index: Any = None) -> Any:
    """Output ``[T, D]`` and report for one row."""
    index = np.arange(len(x)) if index is None else index
    y, report = program(cfg)(p, jnp.asarray(x, jnp.float32)[None], inputs(index[None], ids[None], key))
    return np.asarray(y[0], np.float64), report


def logits(p: Any, x: np.ndarray = X) -> np.ndarray:
    return np.asarray(x, np.float64) @ p["router"]["kernel"].astype(np.float64)


DROPLESS: dict[str, tuple[dict[str, Any], bool, Any]] = {
    "topk after": ({"name": "topk", "k": 3}, False, lambda z, p: ref.topk(z, 3, "after")),
    "topk before": ({"name": "topk", "softmax": "before"}, False, lambda z, p: ref.topk(z, 2, "before")),
    "switch": ({"name": "switch"}, False, lambda z, p: ref.topk(z, 1, "before")),
    "gshard": ({"name": "gshard"}, False, lambda z, p: ref.gshard(z)),
    "sigmoid": ({"name": "sigmoid"}, False, lambda z, p: ref.sigmoid_topk(z, 2, True, 1.0, np.zeros(E), 1, 1)),
    "sigmoid raw": (
        {"name": "sigmoid", "normalize": False, "k": 1},
        False,
        lambda z, p: ref.sigmoid_topk(z, 1, False, 1.0, np.zeros(E), 1, 1),
    ),
    "deepseek_v3": (
        {"name": "deepseek_v3", "k": 3, "groups": 3, "keep_groups": 2, "scale": 2.5},
        False,
        lambda z, p: ref.sigmoid_topk(z, 3, True, 2.5, p["router"]["bias"], 3, 2),
    ),
    "expert_choice": ({"name": "expert_choice", "factor": 1.5}, False, lambda z, p: ref.expert_choice(z, 1.5)),
    "base training": ({"name": "base"}, True, lambda z, p: ref.base(z, True, 20, 0.1)),
    "base": ({"name": "base"}, False, lambda z, p: ref.base(z, False, 20, 0.1)),
    "sinkhorn training": ({"name": "sinkhorn"}, True, lambda z, p: ref.sinkhorn(z, True, 1, 8)),
    "sinkhorn top-2": ({"name": "sinkhorn", "k": 2}, True, lambda z, p: ref.sinkhorn(z, True, 2, 8)),
    "sinkhorn": ({"name": "sinkhorn"}, False, lambda z, p: ref.sinkhorn(z, False, 1, 8)),
}


def test_every_router_has_a_reference() -> None:
    assert {name.split()[0] for name in DROPLESS} | {"hash", "soft"} == set(table("lm.ffn.moe.routers"))


@pytest.mark.parametrize("case", DROPLESS)
def test_a_router_is_its_loop_over_tokens(case: str) -> None:
    router, training, by_hand = DROPLESS[case]
    cfg = model(router=router)
    p, experts = weights(cfg)
    y, report = run(cfg, p, key=KEY if training else None)
    choice = by_hand(logits(p), p)
    np.testing.assert_allclose(y, ref.combine(X, choice, experts), rtol=0, atol=2e-4)
    counts = np.bincount([e for row in choice for e, g in row if g], minlength=E)
    np.testing.assert_array_equal(report["sums"]["counts_E"], counts)
    assert y.std() > 0.1 and len(set(counts)) > 0


def test_gshard_in_training_draws_its_second_expert() -> None:
    cfg = model(router={"name": "gshard"})
    p, experts = weights(cfg)
    y, report = run(cfg, p, key=KEY)
    noise, uniform = jax.random.split(jax.random.split(KEY)[1])
    drawn = np.asarray(jax.random.gumbel(noise, (T, E)), np.float64), np.asarray(jax.random.uniform(uniform, (T,)))
    choice = ref.gshard(logits(p), *drawn)
    np.testing.assert_allclose(y, ref.combine(X, choice, experts), rtol=0, atol=2e-4)
    kept = sum(g > 0 for row in choice for _, g in row)
    assert T < kept < 2 * T and float(report["sums"]["chosen"]) == kept
    assert not np.allclose(y, run(cfg, p)[0])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", ["random", "modulo"])
def test_hash_goes_by_the_id_alone(kind: str, k: int) -> None:
    cfg = model(router={"name": "hash", "table": kind, "k": k})
    p, experts = weights(cfg)
    assert "router" not in p
    y, report = run(cfg, p)
    rows = np.asarray(report["taps"]["experts"])[0]
    assert all(len(set(row)) == k for row in rows.tolist())
    assert all((rows[IDS == i] == rows[IDS == i][0]).all() for i in set(IDS))
    if kind == "modulo":
        np.testing.assert_array_equal(rows[:, 0], IDS % E)
    want = ref.combine(X, [[(e, 1 / k) for e in row] for row in rows.tolist()], experts)
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(run(cfg, p, x=X + 1)[1]["taps"]["experts"][0], rows)
    router = moe(cfg).router
    assert isinstance(router, Hash)
    every = router.experts_of(V, E)
    assert np.ptp(np.bincount(every[:, 0], minlength=E)) <= 1  # all experts serve as many ids


@pytest.mark.parametrize("slots", [1, 3])
def test_soft_slots(slots: int) -> None:
    cfg = model(router={"name": "soft", "slots": slots})
    p, experts = weights(cfg)
    y, _ = run(cfg, p)
    want = ref.soft(X, p["router"]["kernel"].astype(np.float64), float(p["router"]["scale"][0]), slots, experts)
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-4)
    one, _ = run(cfg, p, x=X[:1], ids=IDS[:1])  # one token is the input of every slot
    z = ref.soft(X[:1], p["router"]["kernel"].astype(np.float64), float(p["router"]["scale"][0]), slots, experts)
    np.testing.assert_allclose(one, z, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dispatch", ["sorted", "buffers"])
@pytest.mark.parametrize("priority", ["choice", "token", "gate"])
def test_capacity_drops_what_the_loop_drops(dispatch: str, priority: str) -> None:
    cfg = model(**LIMITED, priority=priority, **({"dispatch": dispatch} if dispatch == "buffers" else {}))
    p, experts = weights(cfg)
    y, report = run(cfg, p)
    places = int(np.ceil(0.5 * 2 * T / E))
    choice = ref.drop(ref.topk(logits(p), 2, "after"), E, places, priority)
    np.testing.assert_allclose(y, ref.combine(X, choice, experts), rtol=0, atol=2e-4)
    kept = sum(g > 0 for row in choice for _, g in row)
    assert float(report["sums"]["kept"]) == kept < 2 * T
    assert cfg.ffn.report({k: np.asarray(v) for k, v in report["sums"].items()})["moe/dropped"] == pytest.approx(
        1 - kept / (2 * T)
    )


def test_capacity_for_all_is_dropless() -> None:
    free = model()
    p, _ = weights(free)
    want, _ = run(free, p)
    for dispatch in ("sorted", "buffers"):
        got, report = run(model(capacity=float(E), dispatch=dispatch), p, key=KEY)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        assert report["sums"]["kept"] == report["sums"]["chosen"] == 2 * T
    assert moe(model(capacity=0.1)).places(T, False) is None  # eval_capacity None: no limit


def test_capacity_without_k_drops_three_quarters_of_second_choices() -> None:
    """OpenMoE's formula under perfectly balanced top-2 routing: all first choices stay, a quarter of the second
    ones."""
    n, t = 8, 128
    first = np.arange(t) % n
    experts = jnp.asarray(np.stack([first, (first + 3) % n], 1), jnp.int32)
    choice = TokenChoice(experts, jnp.ones((t, 2)), jnp.ones((t, n)))
    cfg = merge(BASE, {"ffn": {"name": "moe", "experts": n, "capacity": 1.25, "capacity_counts_k": False}}, "model")
    places = moe(cfg).places(t, True)
    assert places == 20
    kept = np.asarray(limit(choice, jnp.ones(t, bool), places, "choice"))
    assert kept[:, 0].all() and kept[:, 1].mean() == 0.25
    assert kept[: t // 4, 1].all() and not kept[t // 2 :, 1].any()  # dropped towards the end


def test_padding_takes_no_place_and_counts_for_nothing() -> None:
    cfg = model(capacity=0.6)
    p, _ = weights(cfg)
    index = np.where(np.arange(T) % 3 == 1, -1, np.arange(T))
    y, report = run(cfg, p, key=KEY, index=index)
    alone = index >= 0
    # The number of places follows the length of the row, padding included.
    choice = ref.drop(ref.topk(logits(p, X[alone]), 2, "after"), E, int(np.ceil(0.6 * 2 * T / E)), "choice")
    _, experts = weights(cfg)
    np.testing.assert_allclose(y[alone], ref.combine(X[alone], choice, experts), rtol=0, atol=2e-4)
    assert float(report["sums"]["tokens"]) == alone.sum() == float(report["sums"]["chosen"]) / 2


def test_rows_compete_in_a_batch_and_not_in_a_sequence() -> None:
    alone, _ = run(model(**LIMITED), weights(model())[0])
    x = jnp.asarray(np.stack([X, X[::-1]]), jnp.float32)
    layer = inputs(np.broadcast_to(np.arange(T), (2, T)), np.stack([IDS, IDS[::-1]]))
    for group in ("batch", "sequence"):
        cfg = model(**LIMITED, group=group)
        y, _ = program(cfg)(weights(cfg)[0], x, layer)
        assert np.allclose(y[0], alone, atol=1e-5) == (group == "sequence")


ROUTERS = {name: DROPLESS[name][0] for name in DROPLESS if name in table("lm.ffn.moe.routers")} | {
    "topk": DROPLESS["topk after"][0],
    "hash": {"name": "hash"},
    "soft": {"name": "soft"},
}
STEADY = {"name": "switch", "jitter": 0.0}
LEAKS: list[tuple[dict[str, Any], bool]] = [
    *(({"router": router}, training) for router in ROUTERS.values() for training in (False, True)),
    ({"router": {"name": "base", "evaluation": "balanced"}}, False),
    ({"router": {"name": "sinkhorn", "evaluation": "balanced"}}, False),
    *(({**LIMITED, "priority": priority}, False) for priority in ("choice", "token", "gate")),
    ({"capacity": 0.5, "router": STEADY}, True),
    ({"capacity": 0.5, "priority": "gate", "router": STEADY}, True),
]


def test_every_router_is_examined() -> None:
    assert set(ROUTERS) == set(table("lm.ffn.moe.routers"))


@pytest.mark.parametrize(("ffn", "training"), LEAKS, ids=str)
def test_what_leaks_says_so(ffn: dict[str, Any], training: bool) -> None:
    """Later tokens change earlier outputs exactly where the plug declares it: seen in the outputs of other texts, since
    a choice has no gradient. A router that does not leak gives a token on its own what it gives it in its text."""
    cfg = model(**ffn)
    key, cut, found = KEY if training else None, 12, False
    for seed in range(4):
        p, _ = weights(cfg, seed)
        want, _ = run(cfg, p, key=key)
        rng = np.random.default_rng(seed)
        other = np.concatenate([X[:cut], 2 * rng.normal(size=(T - cut, D))])
        ids = np.concatenate([IDS[:cut], rng.integers(0, V, T - cut)])
        got, _ = run(cfg, p, x=other, key=key, ids=ids)
        found |= np.abs(got - want)[:cut].max() > 1e-5
        assert np.abs(got - want)[cut:].max() > 1e-3
    assert found == moe(cfg).leaks(training)
    if not training and not cfg.ffn.uncached:
        alone = np.concatenate([run(cfg, p, x=X[t : t + 1], ids=IDS[t : t + 1])[0] for t in range(5)])
        np.testing.assert_allclose(alone, run(cfg, p)[0][:5], rtol=0, atol=1e-5)
    assert bool(cfg.ffn.uncached) >= moe(cfg).leaks(False)


@pytest.mark.parametrize(
    "ffn", [*({"router": ROUTERS[n]} for n, c in table("lm.ffn.moe.routers").items() if c.learned), LIMITED], ids=str
)
def test_logits_that_are_not_numbers_are_not_hidden(ffn: dict[str, Any]) -> None:
    """Neither as zeros nor as drops; training then refuses the step (`test_moe.py`)."""
    cfg = model(**ffn)
    p, _ = weights(cfg)
    p["router"]["kernel"][0, 0] = np.nan
    assert np.isnan(run(cfg, p)[0]).any()


def test_sinkhorn_reaches_both_marginals() -> None:
    z = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)) * 2, jnp.float32)
    mask = jnp.arange(40) < 33
    plan = np.exp(np.asarray(sinkhorn(z, mask, 60), np.float64))[:33]
    np.testing.assert_allclose(plan.sum(1), 1 / 33, rtol=1e-4)
    np.testing.assert_allclose(plan.sum(0), 1 / 5, rtol=1e-3)


@pytest.mark.parametrize("n", [32, 30])
def test_base_is_balanced_and_nearly_optimal(n: int) -> None:
    """Against the exact assignment (Hungarian algorithm)."""
    from scipy.optimize import linear_sum_assignment

    z = np.random.default_rng(3).normal(size=(n, 4)).astype(np.float32) + np.array([3, 0, 0, 0], np.float32)
    mask = jnp.ones(n, bool)
    got = np.asarray(balanced_assignment(sinkhorn(jnp.asarray(z) / 0.1, mask, 20), mask))
    assert np.bincount(got, minlength=4).max() == -(-n // 4)
    if n == 32:
        assert set(np.bincount(got)) == {8}
        rows, columns = linear_sum_assignment(-np.repeat(z, 8, axis=1))
        optimum = z[rows, columns // 8].sum()
        assert z[np.arange(n), got].sum() >= optimum - 0.02 * abs(optimum)
        assert np.bincount(z.argmax(1), minlength=4).max() > 16


def test_the_bias_balances_a_collapsed_router() -> None:
    cfg = model(router={"name": "deepseek_v3", "k": 1, "bias_rate": 0.02}, load_balance_loss=0.0)
    p, _ = weights(cfg)
    p["router"] = {"kernel": 0.1 * p["router"]["kernel"], "bias": np.array([0.5, 0, 0, 0, 0, 0], np.float32)}
    found = []
    for i in range(60):
        report = run(cfg, p, x=np.random.default_rng(i).normal(size=(T, D)))[1]
        found.append(float(report["sums"]["counts_E"].max()) * E / T - 1)
        p["router"] = {**p["router"], "bias": np.asarray(cfg.ffn.update(p, report["sums"])["router/bias"])}
    assert found[0] == E - 1 and np.mean(found[-20:]) < 1.5


def test_losses_of_a_uniform_router_and_gradient_of_the_probabilities() -> None:
    cfg = model(load_balance_loss=1.0, router_z_loss=0.5)
    p, _ = weights(cfg)
    layer = inputs(np.arange(T)[None], IDS[None])
    x = jnp.asarray(X, jnp.float32)[None]

    @jax.jit
    @jax.value_and_grad
    def loss(kernel: jax.Array) -> jax.Array:
        return program(cfg)({**p, "router": {"kernel": kernel}}, x, layer)[1]["loss"]

    k = p["router"]["kernel"]
    assert float(loss(0 * k)[0]) == pytest.approx(1.0 + 0.5 * np.log(E) ** 2, rel=1e-5)
    share = np.bincount([e for r in logits(p) for e in ref.best(r, 2)], minlength=E) / T

    def by_hand(kernel: np.ndarray) -> float:  # the share of choices stays as it is
        z = X @ kernel
        balance = E / 2 * (share * np.stack([ref.softmax(r) for r in z]).mean(0)).sum()
        return balance + 0.5 * (np.log(np.exp(z).sum(1)) ** 2).mean()

    value, slope = loss(jnp.asarray(k))
    assert float(value) == pytest.approx(by_hand(k.astype(np.float64)), rel=1e-4)
    step, k = np.random.default_rng(5).normal(size=k.shape), k.astype(np.float64)
    want = (by_hand(k + 1e-5 * step) - by_hand(k - 1e-5 * step)) / 2e-5
    assert (np.asarray(slope) * step).sum() == pytest.approx(want, rel=1e-3)


def test_equal_experts_are_one_and_their_order_is_nothing() -> None:
    cfg = model()
    p, experts = weights(cfg)
    same = {**p, "experts": jax.tree.map(lambda k: np.repeat(k[:1], E, axis=0), p["experts"])}
    np.testing.assert_allclose(run(cfg, same)[0], experts[0](X), rtol=0, atol=2e-4)
    turn = np.random.default_rng(0).permutation(E)
    turned = {
        "router": {"kernel": p["router"]["kernel"][:, turn]},
        "experts": jax.tree.map(lambda k: k[turn], p["experts"]),
    }
    np.testing.assert_allclose(run(cfg, turned)[0], run(cfg, p)[0], rtol=0, atol=1e-5)


def test_a_bias_of_zero_is_no_bias_and_a_bias_moves_choices_only() -> None:
    plain, biased = (model(router={"name": name, "k": E - 1}) for name in ("sigmoid", "deepseek_v3"))
    p, _ = weights(plain)

    def with_bias(bias: Any) -> Any:
        router = {**p["router"], "bias": np.asarray(bias, np.float32)}
        return run(biased, {**p, "router": router})

    want, report = run(plain, p)
    np.testing.assert_array_equal(with_bias(np.zeros(E))[0], want)
    np.testing.assert_allclose(with_bias(np.full(E, 0.7))[0], want, rtol=0, atol=1e-6)  # the same choices
    other = with_bias([9.0, 0, 0, 0, 0, 0])[1]["sums"]["counts_E"]
    assert other[0] == T > report["sums"]["counts_E"][0]


def test_balance_by_sequence_is_the_mean_of_rows() -> None:
    cfg = model(load_balance_loss=1.0, balance_over="sequence")
    p, _ = weights(cfg)
    x = np.stack([X, X[::-1] * 0.5 + 1])
    layer = inputs(np.broadcast_to(np.arange(T), (2, T)), np.stack([IDS, IDS]))
    report = program(cfg)(p, jnp.asarray(x, jnp.float32), layer)[1]
    rows = [float(run(cfg, p, x=row)[1]["loss"]) for row in x]
    assert float(report["loss"]) == pytest.approx(np.mean(rows), rel=1e-5)
    assert rows[0] != pytest.approx(rows[1], rel=1e-2)


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"evaluation": "balance"},
            r"model\.ffn\.router\.evaluation: unknown name 'balance' .*valid: argmax, balanced",
        ),
        ({"iterations": 0}, r"model\.ffn\.router\.iterations: must be at least 1, found 0"),
    ],
)
def test_mistakes_of_balancing_routers(name: str, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_config({"ffn": {"name": "moe", "router": {"name": name, **setting}}})


LEARNED = [name for name, (router, *_) in DROPLESS.items() if router["name"] not in ("hash", "random")]


@pytest.mark.parametrize("name", LEARNED)
def test_nan_in_a_router_is_never_hidden(name: str) -> None:
    """One column of the matrix is NaN: so is every output, whichever experts were chosen."""
    cfg = model(router=DROPLESS[name][0])
    p, _ = weights(cfg)
    p["router"]["kernel"][:, 2] = np.nan
    for key in (None, KEY):
        y, _ = run(cfg, p, key=key)
        dropped = (y == 0).all(-1) if name == "expert_choice" else np.zeros(T, bool)  # tokens that no expert chose
        assert np.isnan(y[~dropped]).all() and not dropped.all()


def test_padding_is_not_dropped_by_experts_that_choose() -> None:
    """Three of fourteen places are padding, and every token has a place: nothing is dropped."""
    cfg = model(router={"name": "expert_choice", "factor": float(E)})
    p, _ = weights(cfg)
    index = np.array([*range(11), -1, -1, -1])
    _, report = run(cfg, p, X[:14], ids=IDS[:14], index=index)
    assert float(report["sums"]["chosen"]) == float(report["sums"]["kept"]) == 11
