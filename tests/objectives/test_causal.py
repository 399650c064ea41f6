"""Objectives against losses written from their definitions in float64, forward and gradient."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import rms_ratio
from cases.objective_case import ObjectiveCase

from lm import compat
from lm.config import ModelConfig, merge, model_config, plug
from lm.errors import UserError
from lm.heads.base import Head, Targets
from lm.model import params as params_lib
from lm.model.decoder import readout
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.objectives import TABLE
from lm.objectives.base import LossOut
from lm.objectives.forward import HIDDEN, Forward
from lm.objectives.likelihood import head_loss

B, T, V = 3, 13, 37
CFG = model_config({"vocab_size": V, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 24, "max_positions": 32})
HEADS: tuple[dict[str, Any], ...] = (
    {},
    {"tie": False},
    {"bias": True},
    {"tie": False, "bias": True, "softcap": 2.0},
)


@dataclass(frozen=True)
class PlainHead(Head):
    """A head without a fused loss: what any new head plug looks like to an objective."""

    inner: Any

    def module(self, cfg: Any, name: str | None = None) -> Any:
        return self.inner.module(dataclasses.replace(cfg, head=self.inner), name)


def _plain(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, head=PlainHead(cfg.head))


def _params(cfg: ModelConfig, seed: int = 0) -> Any:
    """Random and large, biases included, so that every term of a gradient shows."""
    leaves, tree = jax.tree.flatten(params_lib.abstract(cfg))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype) for x in leaves])


def _batch(seed: int = 1) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1))
    weights = rng.choice([0.0, 0.5, 1.0], (B, T))
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    return {k: jnp.asarray(v, jnp.float32 if k == "weights" else jnp.int32) for k, v in arrays.items()}


def _by_definition(cfg: ModelConfig, params: Any, hidden: Any, batch: dict[str, jax.Array], z_loss: float) -> Any:
    logits = readout(cfg, params, hidden)
    log_z = jax.nn.logsumexp(logits, -1)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    w = batch["weights"]
    sums = {
        "nll": (w * nll).sum(),
        "weight": w.sum(),
        "z": (w * log_z**2).sum(),
        "correct": (w * (logits.argmax(-1) == batch["targets"])).sum(),
    }
    return (w * (nll + z_loss * log_z**2)).sum(), sums


def _loss(objective: Any, cfg: ModelConfig, params: Any, batch: Any) -> LossOut:
    out: LossOut = objective.loss(Forward(DecoderModel(cfg), params), batch)
    return out


def _gradients(f: Any, params: Any) -> Any:
    return jax.jit(jax.value_and_grad(f, has_aux=True))(params)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(h) or "tied")
def test_fused_and_generic_loss_equal_the_definition(head: dict[str, Any], z_loss: float) -> None:
    """Pieces of 1, of some (13 tokens in pieces of 4), of all tokens: value, sums and gradients."""
    cfg, batch = merge(CFG, {"head": head}, "model"), _batch()
    params = {k: v for k, v in _params(cfg).items() if k in ("embed", "head")}
    hidden = jnp.asarray(np.random.default_rng(4).normal(size=(B, T, 16)), jnp.float32)
    variants = ((cfg, 1), (cfg, 12), (cfg, 0), (_plain(cfg), 12), (_plain(cfg), 0))

    @jax.jit
    def run(params: Any, hidden: Any) -> Any:
        def loss(args: Any, model: Any, chunk: int) -> Any:
            params, hidden = args
            over = Targets(hidden, batch["targets"], batch["weights"], z_loss, chunk)
            return head_loss(DecoderModel(model), params, over)

        def definition(args: Any) -> Any:
            return _by_definition(cfg, *args, batch, z_loss)

        args = (params, hidden)
        all_of_them = [jax.value_and_grad(loss, has_aux=True)(args, model, chunk) for model, chunk in variants]
        return jax.value_and_grad(definition, has_aux=True)(args), all_of_them

    ((want, want_sums), want_grad), results = run(params, hidden)
    for (model, chunk), ((got, sums), grad) in zip(variants, results, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6)
        assert {k: v.dtype for k, v in sums.items()} == dict.fromkeys(want_sums, jnp.float32)
        for name in want_sums:
            np.testing.assert_allclose(sums[name], want_sums[name], rtol=2e-6, err_msg=name)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grad), jax.tree.leaves(want_grad), strict=True):
            limit = 1e-5 * float(jnp.abs(b).max())  # 0 for the embedding of an untied head
            np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"{path} {chunk} {model.head}")


def test_the_value_is_the_same_with_and_without_a_gradient() -> None:
    params, batch, objective = _params(CFG), _batch(), TABLE["causal"](z_loss=1e-3, chunk=8)
    loss, sums = jax.jit(lambda p: _loss(objective, CFG, p, batch))(params)
    (with_grad, sums_too), _ = _gradients(lambda p: _loss(objective, CFG, p, batch), params)
    np.testing.assert_allclose(loss, with_grad, rtol=1e-6)
    for name, value in sums.items():
        np.testing.assert_allclose(value, sums_too[name], rtol=1e-6)


def test_gradient_scales_with_the_loss() -> None:
    """What is differentiated may be a mean, or one term among others."""
    params, batch, objective = _params(CFG), _batch(), TABLE["causal"](chunk=8)

    def mean(p: Any) -> Any:
        loss, sums = _loss(objective, CFG, p, batch)
        return loss / sums["weight"] + 0.1 * jnp.square(p["embed"]).sum(), sums

    def definition(p: Any) -> Any:
        hidden = DecoderModel(CFG).apply(p, Inputs(batch["inputs"]), watch=HIDDEN).hidden_BTD
        loss, sums = _by_definition(CFG, p, hidden, batch, 0.0)
        return loss / sums["weight"] + 0.1 * jnp.square(p["embed"]).sum(), sums

    for a, b in zip(*(jax.tree.leaves(_gradients(f, params)[1]) for f in (mean, definition)), strict=True):
        assert rms_ratio(a, b) <= 5e-6


def test_packed_rows_are_their_documents_alone() -> None:
    params, objective = _params(CFG), TABLE["causal"](chunk=8)
    tokens = np.random.default_rng(2).integers(0, V, (1, T + 1))
    cut = 5
    index = np.r_[np.arange(cut), np.arange(T - cut)][None]
    segments = np.r_[np.zeros(cut), np.ones(T - cut)][None]
    weights = np.ones((1, T))
    weights[0, cut - 1] = 0  # the target there belongs to the next document

    def batch(a: int, b: int, **more: Any) -> dict[str, jax.Array]:
        out = {"inputs": tokens[:, a:b], "targets": tokens[:, a + 1 : b + 1], "weights": weights[:, a:b], **more}
        return {k: jnp.asarray(v, jnp.float32 if k == "weights" else jnp.int32) for k, v in out.items()}

    run = jax.jit(lambda b: jax.value_and_grad(lambda p: _loss(objective, CFG, p, b), has_aux=True)(params))
    (packed, _), g_packed = run(batch(0, T, segments=segments, index=index))
    alone = [run(batch(0, cut)), run(batch(cut, T))]
    np.testing.assert_allclose(packed, sum(loss for (loss, _), _ in alone), rtol=2e-6)
    g_alone = jax.tree.map(jnp.add, *(g for _, g in alone))
    for a, b in zip(jax.tree.leaves(g_packed), jax.tree.leaves(g_alone), strict=True):
        assert rms_ratio(a, b) <= 1e-5


@pytest.mark.parametrize("model", [CFG, _plain(CFG)], ids=["fused", "generic"])
def test_no_array_holds_all_logits(model: ModelConfig) -> None:
    params, batch = params_lib.abstract(CFG), {k: jnp.tile(v, (1, 8)) for k, v in _batch().items()}

    def largest(chunk: int) -> int:
        objective = TABLE["causal"](chunk=chunk)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: _loss(objective, model, p, batch)[0]))(params)
        return max(_sizes(jaxpr.jaxpr))

    assert largest(12) < B * T * 8 * V <= largest(0)


def _sizes(jaxpr: Any) -> Any:
    """Elements of every array with a vocabulary axis."""
    for equation in jaxpr.eqns:
        for var in equation.outvars:
            if V in getattr(var.aval, "shape", ()):
                yield int(np.prod(var.aval.shape))
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _sizes(getattr(inner, "jaxpr", inner))


def test_bfloat16_hidden_states() -> None:
    """Logits and statistics stay float32: the loss errs by the rounding of the products' inputs alone."""
    rng = np.random.default_rng(3)
    hidden, table = rng.normal(size=(B, T, 16)), rng.normal(size=(V, 16))
    hidden, table = (jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in (hidden, table))
    batch = _batch()

    def run(dtype: Any) -> Any:
        def f(h: Any, t: Any) -> Any:
            over = Targets(h.astype(dtype), batch["targets"], batch["weights"], chunk=12)
            return head_loss(DecoderModel(CFG), {"embed": t}, over)[0]

        return jax.value_and_grad(f, (0, 1))(hidden, table)

    (half, g_half), (full, g_full) = run(jnp.bfloat16), run(jnp.float32)
    np.testing.assert_allclose(half, full, rtol=1e-6)
    for a, b in zip(g_half, g_full, strict=True):
        assert 0 < rms_ratio(a, b) <= 1e-2


def test_one_device_equals_eight() -> None:
    if jax.device_count() < 8:
        pytest.fail("the suite starts with eight CPU devices; see tests/conftest.py")
    mesh, spec = compat.auto_mesh((8,), ("data",)), jax.sharding.PartitionSpec
    batch = {k: jnp.concatenate([v, v, v[:2]]) for k, v in _batch().items()}
    spread = jax.device_put(batch, jax.sharding.NamedSharding(mesh, spec("data")))
    params, objective = _params(CFG), TABLE["causal"](z_loss=1e-3, chunk=16)
    run = jax.jit(jax.value_and_grad(lambda p, b: _loss(objective, CFG, p, b), has_aux=True))
    (want, _), g_want = run(params, batch)
    (got, _), g_got = run(jax.device_put(params, jax.sharding.NamedSharding(mesh, spec())), spread)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(g_got), jax.tree.leaves(g_want), strict=True):
        assert rms_ratio(a, b) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_loss": -1.0}, r"train\.objective\.z_loss: .*found -1\.0"),
        ({"z_loss": float("nan")}, r"train\.objective\.z_loss: .*found nan"),
        ({"chunk": -1}, r"train\.objective\.chunk: .*found -1"),
        ({"chunks": 8}, r"train\.objective\.chunks: unknown key.*'chunk'"),
        ({"name": "casual"}, r"train\.objective\.name: .*'causal'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plug("lm.objectives", {"name": "causal", **change}, "train.objective")


class _Definition(ObjectiveCase):
    """``sum w (-log p + z log^2 Z)``."""

    z_loss = 0.0

    def loss(self, logits_BTV: np.ndarray, batch: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        log_z = np.log(np.exp(logits_BTV).sum(-1))
        nll = log_z - np.take_along_axis(logits_BTV, batch["targets"][..., None], -1)[..., 0]
        w = np.float64(batch["weights"])
        correct = logits_BTV.argmax(-1) == batch["targets"]
        sums = {"nll": w * nll, "z": w * log_z**2, "weight": w, "correct": w * correct}
        return float((w * (nll + self.z_loss * log_z**2)).sum()), {k: float(v.sum()) for k, v in sums.items()}


class TestCausal(_Definition):
    objective = TABLE["causal"](chunk=5)


class TestCausalWithZLoss(_Definition):
    z_loss = 0.3
    objective = TABLE["causal"](z_loss=0.3, chunk=0)
