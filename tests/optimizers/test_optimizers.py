"""Optimizers against NumPy and PyTorch, on stacked and unstacked layers; schedules against their definitions."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.config import build, model_config, plug
from lm.errors import UserError
from lm.model import params
from lm.model.params import Axes
from lm.optimizers import TABLE, schedules
from lm.optimizers.base import make, n_bytes
from lm.optimizers.plain import SGD, AdamW, Lion
from lm.optimizers.sgd_sai import SGDSaI, g_snr
from lm.train.config import TrainConfig

CFG = model_config({"vocab_size": 24, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24})
ALWAYS = optax.constant_schedule(1.0)
AXES = params.axes(CFG)
NO_AXES = Axes({})  # of trees that are no model's


@pytest.fixture(scope="module")
def weights() -> Any:
    return params.init(CFG, jax.random.key(0))


def gradients(tree: Any, seed: int) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def walk(tx: optax.GradientTransformation, tree: Any, grads: list[Any]) -> Any:
    """The parameters after one step per gradient."""
    update, state = jax.jit(tx.update), tx.init(tree)
    for g in grads:
        updates, state = update(g, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def sai_in_numpy(p: Any, grads: list[Any], lr: list[float], wd: float, mu: float) -> Any:
    """The card's rules for one tensor, in float64."""
    p, m, scale = p.astype(np.float64), None, None
    for g, rate in zip(grads, lr, strict=True):
        g = g.astype(np.float64)
        if m is None:
            scale = np.sqrt((g**2).sum()) / (g.std(ddof=1) + 1e-8)
            m = g
        else:
            m = mu * m + (1 - mu) * g
        p = (1 - rate * wd) * p - rate * scale * m
    return p


def test_sgd_sai_is_the_published_rule_on_every_named_tensor(weights: Any) -> None:
    factor = schedules.Cosine(warmup=2).factor(4)
    tx = make(SGDSaI(learning_rate=0.03, weight_decay=0.2), factor, AXES)
    grads = [gradients(weights, seed) for seed in range(4)]
    found = params.names(params.unstack(walk(tx, weights, grads)))
    apart = [params.names(params.unstack(g)) for g in grads]
    rates = [0.03 * float(factor(i)) for i in range(4)]
    assert len(found) == 2 + 9 * CFG.n_layers
    for name, p in params.names(params.unstack(weights)).items():
        want = sai_in_numpy(np.asarray(p), [np.asarray(g[name]) for g in apart], rates, 0.2, 0.9)
        np.testing.assert_allclose(found[name], want, rtol=2e-5, atol=2e-6, err_msg=name)


def test_g_snr_of_a_gradient_without_mean_is_the_root_of_its_size() -> None:
    g = np.random.default_rng(0).normal(size=4096)
    assert float(g_snr(jnp.asarray(g - g.mean()))) == pytest.approx(math.sqrt(4095), rel=1e-6)
    lifted = float(g_snr(jnp.asarray(g - g.mean() + 2.0)))
    assert lifted == pytest.approx(math.sqrt(4095 * (1 + 4.0 / g.var())), rel=1e-5)


@pytest.mark.parametrize("c", [1e-3, 7.0, 1e4])
def test_g_snr_does_not_depend_on_the_size_of_the_loss(c: float) -> None:
    g = jnp.asarray(np.random.default_rng(1).normal(size=(8, 5)) + 0.3, jnp.float32)
    assert float(g_snr(c * g)) == pytest.approx(float(g_snr(g)), rel=1e-4)


def test_g_snr_at_its_edges() -> None:
    assert float(g_snr(jnp.ones(1))) == 1.0
    assert float(g_snr(jnp.zeros(7))) == 0.0
    assert float(g_snr(jnp.full(3, jnp.nan))) == 0.0


def test_scale_one_is_sgd_with_momentum(weights: Any) -> None:
    grads = [gradients(weights, seed) for seed in range(3)]
    one = walk(make(SGDSaI(0.01, 0.1, scale="one"), ALWAYS, AXES), weights, grads)
    plain = walk(make(SGD(0.01, 0.1), ALWAYS, AXES), weights, grads)
    jax.tree.map(np.testing.assert_array_equal, one, plain)
    control = walk(make(SGDSaI(0.01, 0.0, scale="sqrt_numel"), ALWAYS, AXES), weights, grads[:1])
    np.testing.assert_allclose(
        control["embed"], weights["embed"] - 0.01 * (24 * 16) ** 0.5 * grads[0]["embed"], atol=1e-6
    )


def test_a_tensor_without_a_first_gradient_never_trains_unless_refreshed() -> None:
    p = {"a": jnp.ones(4), "b": jnp.ones(4)}
    first = {"a": jnp.zeros(4), "b": jnp.arange(4.0)}
    grads = [first, {"a": jnp.arange(4.0), "b": jnp.arange(4.0)}]
    published = walk(make(SGDSaI(0.1, 0.0), ALWAYS, NO_AXES), p, grads)
    np.testing.assert_array_equal(published["a"], p["a"])
    refreshed = walk(make(SGDSaI(0.1, 0.0, refresh="first_nonzero"), ALWAYS, NO_AXES), p, grads)
    assert np.abs(refreshed["a"] - p["a"]).max() > 0.1
    np.testing.assert_array_equal(published["b"], refreshed["b"])


def test_the_scale_is_taken_once(weights: Any) -> None:
    tx = SGDSaI().direction(AXES)
    state = tx.init(weights)
    scales = []
    for seed in range(3):
        _, state = tx.update(gradients(weights, seed), state)
        scales.append(np.asarray(state["blocks"]["attn"]["q"]["kernel"].scale))
    assert scales[0].shape == (CFG.n_layers,) and scales[0][0] != scales[0][1]
    np.testing.assert_array_equal(scales[0], scales[2])


@pytest.mark.parametrize("name", sorted(TABLE))
def test_stacked_layers_are_updated_as_separate_ones(weights: Any, name: str) -> None:
    tx = make(TABLE[name](weight_decay=0.1), ALWAYS, AXES, clip=1.0)
    grads = [gradients(weights, seed) for seed in range(2)]
    stacked = params.unstack(walk(tx, weights, grads))
    apart = walk(tx, params.unstack(weights), [params.unstack(g) for g in grads])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), stacked, apart)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), apart, params.unstack(weights))
    assert min(jax.tree.leaves(moved)) > 0


def test_state_sizes(weights: Any) -> None:
    n, size = params.count(weights), {}
    for name, cls in TABLE.items():
        size[name] = n_bytes(make(cls(), ALWAYS, AXES), weights) / 4
    tensors = 2 + 9 * CFG.n_layers
    assert size["adamw"] == 2 * n + 2  # two moments, two step counts
    assert size["lion"] == n + 2
    assert size["sgd_sai"] == n + tensors * 1.25 + 1  # one moment; a number and a flag per tensor; the schedule's count
    assert size["sgd"] == size["sgd_sai"]
    assert n < size["muon"] < 2 * n


def test_what_sgd_sai_saves_on_llama_2_7b() -> None:
    """The paper says 25.15 GB in float32 (GiB, as it turns out)."""
    from configs.bases import llama2_7b

    cfg = model_config(llama2_7b.model())
    tree, axes = params.abstract(cfg), params.axes(cfg)
    adam, sai = (n_bytes(make(plug(), ALWAYS, axes), tree) for plug in (AdamW, SGDSaI))
    assert (adam - sai) / 2**30 == pytest.approx(25.1, abs=0.05)


def test_adamw_is_torchs() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch has no build for this Python here")
    p = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    grads = [np.random.default_rng(i).normal(size=(5, 3)).astype(np.float32) for i in range(1, 5)]
    theirs = torch.nn.Parameter(torch.tensor(p))
    adam = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for g in grads:
        theirs.grad = torch.tensor(g)
        adam.step()
    tx = make(AdamW(0.01, 0.1), ALWAYS, NO_AXES)
    ours = walk(tx, {"w": jnp.asarray(p)}, [{"w": jnp.asarray(g)} for g in grads])
    np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), atol=1e-6)


def test_lion_is_the_published_rule() -> None:
    """Algorithm 2 of arXiv 2302.06675 by hand: the sign of one mixture of moment and gradient, another one is kept."""
    rng = np.random.default_rng(0)
    direction = Lion(b1=0.9, b2=0.6).direction(NO_AXES)
    state, moment = direction.init({"w": jnp.zeros(64)}), np.zeros(64)
    for _ in range(4):
        g = rng.normal(size=64)
        want, moment = np.sign(0.9 * moment + 0.1 * g), 0.6 * moment + 0.4 * g
        updates, state = direction.update({"w": jnp.asarray(g, jnp.float32)}, state)
        np.testing.assert_array_equal(updates["w"], want)


def test_muon_orthogonalises_every_layers_matrix(weights: Any) -> None:
    tx = TABLE["muon"](nesterov=False).direction(AXES)
    direction, _ = tx.update(gradients(weights, 3), tx.init(weights), weights)
    for layer in range(CFG.n_layers):
        k = np.asarray(direction["blocks"]["attn"]["k"]["kernel"][layer]).reshape(16, -1)
        singular = np.linalg.svd(k, compute_uv=False)
        assert 0.4 < singular.min() and singular.max() < 1.6  # five steps bring them near 1
    flat = np.asarray(direction["embed"]).reshape(24, 16)
    assert np.linalg.svd(flat, compute_uv=False).max() < 2.0 and np.allclose(
        np.abs(flat), 0.15, atol=1e-3
    )  # Adam's signs


def test_decay_leaves_vectors_alone_unless_told(weights: Any) -> None:
    zero = jax.tree.map(jnp.zeros_like, weights)
    for decay, norm_moves in (("matrices", False), ("all", True)):
        out = walk(make(AdamW(0.1, 0.5, decay), ALWAYS, AXES), weights, [zero])
        assert np.allclose(out["blocks"]["attn"]["q"]["kernel"], 0.95 * weights["blocks"]["attn"]["q"]["kernel"])
        assert np.allclose(out["embed"], 0.95 * weights["embed"])
        assert np.allclose(out["blocks"]["attn_norm"]["scale"], 0.95 if norm_moves else 1.0)


def test_clipping_is_by_the_global_norm() -> None:
    p = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    g = {"a": jnp.full(3, 3.0), "b": jnp.full(4, 4.0)}
    tx = make(SGD(1.0), ALWAYS, NO_AXES, clip=0.5)
    out = walk(tx, p, [g])
    norm = math.sqrt(3 * 9 + 4 * 16)
    np.testing.assert_allclose(out["b"], -4.0 * 0.5 / norm, rtol=1e-6)


def test_a_fraction_of_a_run_is_rounded_up() -> None:
    """A quarter of ten steps is three."""
    part, steps = (schedules.Constant(warmup=amount).factor(10) for amount in (0.25, 3))
    assert [float(part(i)) for i in range(10)] == [float(steps(i)) for i in range(10)]
    assert float(part(1)) < 1 == float(part(3))


def test_schedules() -> None:
    cosine = schedules.Cosine(warmup=4, final=0.1).factor(104)
    assert [round(float(cosine(i)), 3) for i in (0, 1, 3, 4, 54, 104)] == [0.2, 0.4, 0.8, 1.0, 0.55, 0.1]
    wsd = schedules.WSD(warmup=0.1, decay=0.4, final=0.2, shape="linear").factor(10)
    assert [round(float(wsd(i)), 3) for i in range(11)] == [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    root = schedules.WSD(warmup=0.0, decay=4.0, shape="sqrt").factor(8)
    assert [round(float(root(i)), 3) for i in (3, 4, 5, 8)] == [1, 1, 0.5, 0]
    assert float(schedules.Constant().factor(5)(3)) == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "sgd_say"}, "did you mean 'sgd_sai'"),
        ({"optimizer": {"name": "adamw", "lr": 1.0}}, "train.optimizer.lr: unknown key"),
        ({"optimizer": {"name": "adamw", "learning_rate": 0.0}}, "train.optimizer.learning_rate: must be positive"),
        ({"optimizer": {"name": "adamw", "b1": 1.0}}, "train.optimizer.b1: must lie in [0, 1)"),
        ({"optimizer": {"name": "lion", "weight_decay": -1.0}}, "train.optimizer.weight_decay"),
        ({"optimizer": {"name": "sgd_sai", "scale": "snr"}}, "train.optimizer.scale: unknown name 'snr'"),
        ({"optimizer": {"name": "sgd_sai", "refresh": "never"}}, "valid: first_nonzero, first_step"),
        ({"optimizer": {"name": "sgd_sai", "momentum": 1.0}}, "train.optimizer.momentum"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": {"name": "wsd", "shape": "cubic"}}, "train.schedule.shape"),
        ({"schedule": {"name": "cosine", "warmup": -1.0}}, "train.schedule.warmup"),
        ({"schedule": {"name": "cosine", "final": 2.0}}, "train.schedule.final"),
    ],
)
def test_mistakes_name_the_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        build(TrainConfig, change, "train")


def test_decay_has_two_values() -> None:
    with pytest.raises(UserError, match=r"train\.optimizer\.decay: unknown name 'some'; valid: all, matrices"):
        plug("lm.optimizers", {"name": "adamw", "decay": "some"}, "train.optimizer")


BIASED = model_config(
    {
        **{"vocab_size": 24, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24},
        "mixer": {"name": "softmax", "qkv_bias": True, "out_bias": True, "qk_norm": True},
        "positions": {"name": "learned", "size": 8},
        "ffn": {"name": "swiglu", "bias": True},
    }
)


def test_a_bias_of_several_heads_is_a_vector() -> None:
    """``[heads, head_dim]`` does not decay, takes Adam inside Muon, and has no low-rank term."""
    axes, tree = params.axes(BIASED), params.init(BIASED, jax.random.key(1))
    tree = jax.tree.map(lambda x: x + 1.0, tree)
    matrices = params.names(axes.matrices(tree))
    vectors = {name for name, is_matrix in matrices.items() if not is_matrix}
    assert vectors == {name for name in matrices if name.rpartition("/")[2] in ("bias", "scale")}
    assert {f"blocks/attn/{n}/bias" for n in "qkvo"} < vectors and matrices["pos_embed"] and matrices["embed"]
    out = params.names(walk(make(AdamW(0.1, 0.5), ALWAYS, axes), tree, [jax.tree.map(jnp.zeros_like, tree)]))
    for name, before in params.names(tree).items():
        np.testing.assert_allclose(out[name], (0.95 if matrices[name] else 1.0) * before, rtol=1e-6, err_msg=name)
    tx = TABLE["muon"](nesterov=False).direction(axes)
    direction = params.names(tx.update(gradients(tree, 3), tx.init(tree), tree)[0])
    for name in vectors:
        np.testing.assert_allclose(np.abs(direction[name]), 0.15, atol=1e-3, err_msg=name)  # Adam's signs
    for name in ("*/attn/q/bias", "blocks/attn/v/bias"):
        lora = plug("lm.surgery", {"name": "lora", "rank": 1, "targets": (name,)}, "train.surgery")
        with pytest.raises(UserError, match="is a vector, which has no low-rank term"):
            lora.check(BIASED)


def test_the_factors_of_an_adapter_are_matrices_to_muon() -> None:
    lora = plug("lm.surgery", {"name": "lora", "rank": 2, "targets": ("*/attn/*/kernel",)}, "train.surgery")
    axes = params.axes(BIASED)
    tree = lora.init(BIASED, params.init(BIASED, jax.random.key(1)), jax.random.key(2))
    tx = TABLE["muon"](nesterov=False).direction(axes)
    direction = params.names(tx.update(gradients(tree, 3), tx.init(tree), tree)[0])
    assert {name.rpartition("/")[2] for name in direction} == {"lora_a", "lora_b"}
    for name, both in direction.items():
        for one in np.asarray(both):
            singular = np.linalg.svd(one, compute_uv=False)
            assert singular.max() < 2.5 * singular.min(), name


@pytest.mark.parametrize(("warmup", "decay", "total"), [(6.0, 5.0, 10), (0.6, 0.5, 100), (0.0, 11.0, 10)])
def test_warmup_and_decay_that_overlap_are_refused(warmup: float, decay: float, total: int) -> None:
    with pytest.raises(UserError, match=r"train\.schedule: \d+ steps of warmup and \d+ of decay overlap in a run of"):
        schedules.WSD(warmup=warmup, decay=decay).factor(total)
    schedules.WSD(warmup=warmup / 2, decay=decay / 2).factor(2 * total)
