"""Objectives run models by the handle alone: frozen models beside the trained one, reports that cannot be left out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import build, model_config
from lm.errors import UserError
from lm.model import params as params_lib
from lm.model.language_model import DecoderModel
from lm.objectives.base import Batch, LossOut, Objective
from lm.objectives.forward import Forward
from lm.train import step as steps
from lm.train.config import TrainConfig
from lm.train.step import Beside

SMALL = {"vocab_size": 13, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 8, "max_positions": 8}
ADAM = {"name": "adamw", "learning_rate": 0.03}
CFG, TEACHER = model_config(SMALL), model_config({**SMALL, "n_layers": 1, "d_model": 16})
MOE = model_config({**SMALL, "ffn": {"name": "moe", "experts": 4, "d_expert": 4, "load_balance_loss": 0.5}})


@dataclass(frozen=True)
class Towards(Objective):
    """Cross-entropy to a frozen model's distribution."""

    models: ClassVar[tuple[str, ...]] = ("teacher",)

    def loss(self, forward: Forward, batch: Batch) -> LossOut:
        inputs, teacher = forward.rows(batch), forward.models["teacher"]
        log_p = jax.nn.log_softmax(forward.model.readout(forward.params, forward(inputs).hidden_BTD))
        target = jax.nn.softmax(teacher.logits(teacher(inputs).hidden_BTD))
        nll = (batch["weights"] * -(target * log_p).sum(-1)).sum()
        return LossOut(nll, {"nll": nll, "weight": batch["weights"].sum()})


@dataclass(frozen=True)
class Careless(Objective):
    """Knows nothing of reports: the mean of the final states."""

    def loss(self, forward: Forward, batch: Batch) -> LossOut:
        nll = (batch["weights"][..., None] * forward(forward.rows(batch)).hidden_BTD).sum() * 0.0
        return LossOut(nll, {"nll": nll, "weight": batch["weights"].sum()})


def batch(V: int = 13) -> dict[str, jax.Array]:
    tokens = np.random.default_rng(0).integers(0, V, (4, 7))
    ones = np.ones((4, 6), np.float32)
    return {k: jnp.asarray(v) for k, v in {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones}.items()}


def settings(objective: Objective, **models: str) -> TrainConfig:
    made = build(TrainConfig, {"steps": 60, "batch": 4, "data": {"seq_len": 6}, "optimizer": ADAM}, "train")
    return dataclasses.replace(made, objective=objective, models=models)


def test_a_teacher_is_read_and_not_trained() -> None:
    train = settings(Towards(), teacher="some/checkpoint")
    params = params_lib.init(CFG, jax.random.key(0))
    teacher = jax.tree.map(lambda x: 8 * x, params_lib.init(TEACHER, jax.random.key(1)))
    beside = Beside(None, {"teacher": teacher}, (("teacher", DecoderModel(TEACHER)),))
    one = jax.jit(lambda state, rows, beside: steps.step(CFG, train, state, rows, beside))
    state, seen = steps.initial(CFG, train, params), []
    for _ in range(60):
        state, metrics = one(state, batch(), beside)
        seen.append(float(metrics["nll"] / metrics["weight"]))
    logits = DecoderModel(TEACHER).readout(teacher, beside.frozen()["teacher"](Forward.rows(None, batch())).hidden_BTD)  # type: ignore[arg-type]
    entropy = float(-(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean())
    assert seen[0] - entropy > 4 * (seen[-1] - entropy) > 0

    def loss(p: Any, t: Any) -> jax.Array:
        return steps.objective(CFG, train, p, batch(), Beside(None, {"teacher": t}, beside.models))[0]

    ours, theirs = jax.grad(loss, (0, 1))(params, teacher)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(ours)) > 0
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(theirs))


def test_models_that_are_not_asked_for_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.models\.teacher: is missing"):
        settings(Towards())
    with pytest.raises(UserError, match=r"train\.models\.teecher"):
        settings(Towards(), teacher="a", teecher="b")


def test_an_objective_cannot_leave_reports_out() -> None:
    """A mixture's balance loss trains its router although the objective is constant."""
    train = settings(Careless())
    params = params_lib.init(MOE, jax.random.key(0))
    grads, sums = jax.jit(lambda p: steps.gradients(MOE, train, p, batch(), rng=jax.random.key(1)))(params)
    assert float(sums["nll"]) == 0 and float(sums["loss"]) > 0 and "aux" in sums
    assert float(jnp.abs(grads["blocks"]["ffn"]["router"]["kernel"]).max()) > 0
    assert float(jnp.abs(grads["embed"]).max()) > 0
