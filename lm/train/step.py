"""The training step: a pure function of state and batch, jitted once per shape of a batch, its state donated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.config import ModelConfig
from lm.model import params as params_lib
from lm.model import reports
from lm.model.language_model import DecoderModel, LanguageModel
from lm.objectives.base import Batch
from lm.objectives.forward import Forward, Frozen
from lm.optimizers.base import make
from lm.train.config import TrainConfig

State = dict[str, Any]
Params = Any  # a tree of arrays and weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beside:
    """What a step reads and never changes: the parameters `base` that trained ones are added to (None where the surgery
    adds to none), and the parameters of frozen models by name, whose `models` are static."""

    base: Params = None
    params: dict[str, Params] = field(default_factory=dict)
    models: tuple[tuple[str, LanguageModel], ...] = field(default=(), metadata={"static": True})

    def frozen(self) -> dict[str, Frozen]:
        """The models as an objective runs them."""
        return {name: Frozen(model, self.params[name]) for name, model in self.models}


ALONE = Beside()


def transformation(cfg: ModelConfig, train: TrainConfig) -> optax.GradientTransformation:
    """The run's optimizer: clipping, the plug's direction, weight decay, schedule."""
    return make(train.optimizer, train.schedule.factor(train.steps), params_lib.axes(cfg), train.clip)


def draws(cfg: ModelConfig, train: TrainConfig) -> bool:
    """Whether steps draw numbers: for the training itself, or for layers that know training from use."""
    return train.stochastic or reports.has_reports(cfg)


def initial(cfg: ModelConfig, train: TrainConfig, params: Params, seed: int | None = None) -> State:
    """State before step 0: what is trained as `params`, optimizer state `opt`, and int32 scalars `step`, `skipped`
    (non-finite steps so far) and `run` (those in a row up to now); `seed`, to be given where steps draw numbers."""
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "run")}
    drawn = (
        {} if seed is None else {"seed": jnp.asarray(np.uint32(seed).astype(np.int32))}
    )  # 32 bits, whatever they say
    return {"params": params, "opt": transformation(cfg, train).init(params), **counters, **drawn}


def gradients(
    cfg: ModelConfig,
    train: TrainConfig,
    params: Params,
    batch: Batch,
    beside: Beside = ALONE,
    rng: jax.Array | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Gradients (float32) of the mean loss over the batch's weighted targets, and sums ``nll, weight, …``.

    The mean is over the whole batch however it is cut: accumulation gives the big batch's gradient (losses that layers
    add are per part). `params` is what is trained; `rng`: for all that is random in training.
    """
    total, positions = jnp.maximum(batch["weights"].sum(), 1.0), None
    if rng is not None:
        rng, for_positions = jax.random.split(rng)
        positions = train.augmentation.positions(cfg, train.data.seq_len, for_positions, _index(batch))

    def loss(params: Params, part: _Part) -> tuple[jax.Array, dict[str, jax.Array]]:
        summed, sums = objective(cfg, train, params, part.batch, beside, rng=part.rng, positions_BT=part.positions_BT)
        return summed / total, {**sums, "loss": summed / total}

    grad = jax.value_and_grad(loss, has_aux=True)
    whole = _Part(batch, positions, rng)
    if train.accumulate == 1:
        (_, sums), grads = grad(params, whole)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums
    n = train.accumulate
    # Rows of one part are spread over the batch, so that every device holds its share of each part.
    parts = jax.tree.map(lambda v: jnp.moveaxis(v.reshape(-1, n, *v.shape[1:]), 1, 0), _Part(batch, positions))
    parts = _Part(parts.batch, parts.positions_BT, None if rng is None else jax.random.split(rng, n))

    def body(carry: Any, part: _Part) -> tuple[Any, None]:
        (_, sums), grads = grad(params, part)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), carry, (grads, sums)), None

    shapes = jax.eval_shape(lambda p: grad(p, jax.tree.map(lambda x: x[0], parts)), params)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (shapes[1], shapes[0][1]))
    (grads, sums), _ = jax.lax.scan(body, zeros, parts)
    return grads, sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Part:
    """A part of a batch, the positions of its tokens, and its random key."""

    batch: Batch
    positions_BT: jax.Array | None = None
    rng: jax.Array | None = None


def objective(
    cfg: ModelConfig,
    train: TrainConfig,
    params: Params,
    batch: Batch,
    beside: Beside = ALONE,
    *,
    rng: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """The objective's loss (a sum over weighted targets) and sums, with what layers report added. `rng` is given in
    training and only there."""
    whole = train.surgery.attach(cfg, beside.base, params, rng)
    key = jax.random.fold_in(rng, 0) if reports.has_reports(cfg) and rng is not None else None
    forward = Forward(DecoderModel(cfg), whole, key, positions_BT, beside.frozen())
    return reports.add(forward.reports, *train.objective.loss(forward, batch))


def _index(batch: Batch) -> jax.Array:
    """Every token's place in its document, int32 ``[B, T]``."""
    shape = batch["inputs"].shape
    return batch["index"] if "index" in batch else jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)


def step(
    cfg: ModelConfig, train: TrainConfig, state: State, batch: Batch, beside: Beside = ALONE
) -> tuple[State, dict[str, Any]]:
    """One optimizer step and its metrics (sums, `grad_norm`, `ok`). A non-finite loss or gradient changes nothing but
    the counters. The state's seed and the step's number give all that is random."""
    tx = transformation(cfg, train)
    rng = jax.random.fold_in(jax.random.key(state["seed"]), state["step"]) if draws(cfg, train) else None
    grads, metrics = gradients(cfg, train, state["params"], batch, beside, rng)
    norm = optax.global_norm(grads)
    ok = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

    def move(_: None) -> tuple[Params, Any]:
        updates, opt = tx.update(grads, state["opt"], state["params"])
        new = optax.apply_updates(state["params"], updates)
        whole = "aux" in metrics and not train.surgery.adds  # what stays is not moved either
        return reports.apply_rule_updates(cfg, state["params"], new, metrics["aux"]) if whole else new, opt

    params, opt = jax.lax.cond(ok, move, lambda _: (state["params"], state["opt"]), None)
    bad = 1 - ok.astype(jnp.int32)
    new = {
        **state,
        "params": params,
        "opt": opt,
        "step": state["step"] + 1,
        "skipped": state["skipped"] + bad,
        "run": (state["run"] + 1) * bad,
    }
    return new, {**metrics, "grad_norm": norm, "ok": ok, "skipped": new["skipped"], "run": new["run"]}


def evaluator(cfg: ModelConfig, train: TrainConfig, where: jax.sharding.Sharding | None = None) -> Any:
    """Jitted ``(trained, batch, beside) -> sums`` of the objective, without gradients; `where`: the sums' sharding."""
    return jax.jit(lambda trained, batch, beside: objective(cfg, train, trained, batch, beside)[1], out_shardings=where)
