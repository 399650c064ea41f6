"""The training step: a pure function of state and batch, jitted once, its state donated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import optimizers
from lm.config import ModelConfig
from lm.model import reports
from lm.train.config import TrainConfig

State = dict[str, Any]
Batch = dict[str, jax.Array]


def transformation(train: TrainConfig) -> optax.GradientTransformation:
    """The run's optimizer: clipping, the plug's direction, weight decay, schedule."""
    return optimizers.make(train.optimizer, train.schedule.factor(train.steps), train.clip)


def draws(cfg: ModelConfig, train: TrainConfig) -> bool:
    """Whether steps draw numbers: for the training itself, or for layers that know training from use."""
    return train.stochastic or reports.has_reports(cfg)


def initial(params: Any, train: TrainConfig, seed: int | None = None) -> State:
    """State before step 0: what is trained as `params`, optimizer state `opt`, and int32 scalars `step`, `skipped`
    (non-finite steps so far) and `run` (those in a row up to now); `seed`, to be given where steps draw numbers."""
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "run")}
    drawn = {} if seed is None else {"seed": jnp.asarray(seed, jnp.int32)}
    return {"params": params, "opt": transformation(train).init(params), **counters, **drawn}


def gradients(
    cfg: ModelConfig, train: TrainConfig, params: Any, batch: Batch, base: Any = None, rng: jax.Array | None = None
) -> tuple[Any, dict[str, Any]]:
    """Gradients (float32) of the mean loss over the batch's weighted targets, and sums ``nll, weight, …``.

    The mean is over the whole batch however it is cut: accumulation gives the big batch's gradient (losses that layers
    add are per part). `params` is what is trained; `base` what it is attached to, where the surgery adds to parameters
    that stay (None elsewhere). `rng`: for all that is random in training.
    """
    total = jnp.maximum(batch["weights"].sum(), 1.0)
    if rng is not None:
        rng, for_positions = jax.random.split(rng)
        positions = train.augmentation.positions(cfg, train.data.seq_len, for_positions, _index(batch))
        batch = batch if positions is None else {**batch, "positions": positions}

    def loss(params: Any, part: Batch, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        whole = train.surgery.attach(cfg, base, params, rng)
        if reports.has_reports(cfg) and rng is not None:
            part = {**part, "key": jax.random.fold_in(rng, 0)}
        summed, aux = train.objective.loss(cfg, whole, part)
        return summed / total, {**aux, "loss": summed / total}

    grad = jax.value_and_grad(loss, has_aux=True)
    if train.accumulate == 1:
        (_, aux), grads = grad(params, batch, rng)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), aux
    n = train.accumulate
    # Rows of one part are spread over the batch, so that every device holds its share of each part.
    parts = {k: jnp.moveaxis(v.reshape(-1, n, *v.shape[1:]), 1, 0) for k, v in batch.items()}
    rngs = None if rng is None else jax.random.split(rng, n)

    def body(carry: Any, xs: tuple[Batch, Any]) -> tuple[Any, None]:
        (_, aux), grads = grad(params, *xs)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), carry, (grads, aux)), None

    shapes = jax.eval_shape(lambda p: grad(p, *jax.tree.map(lambda x: x[0], (parts, rngs))), params)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (shapes[1], shapes[0][1]))
    (grads, aux), _ = jax.lax.scan(body, zeros, (parts, rngs))
    return grads, aux


def _index(batch: Batch) -> jax.Array:
    """Every token's place in its document, int32 ``[B, T]``."""
    shape = batch["inputs"].shape
    return batch["index"] if "index" in batch else jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)


def step(
    cfg: ModelConfig, train: TrainConfig, state: State, batch: Batch, base: Any = None
) -> tuple[State, dict[str, Any]]:
    """One optimizer step and its metrics (sums, `grad_norm`, `ok`). A non-finite loss or gradient changes nothing but
    the counters. The state's seed and the step's number give all that is random."""
    tx = transformation(train)
    rng = jax.random.fold_in(jax.random.key(state["seed"]), state["step"]) if draws(cfg, train) else None
    grads, metrics = gradients(cfg, train, state["params"], batch, base, rng)
    norm = optax.global_norm(grads)
    ok = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

    def move(_: None) -> tuple[Any, Any]:
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


def evaluator(cfg: ModelConfig, train: TrainConfig, where: Any = None) -> Any:
    """Jitted ``(trained, batch, base) -> sums`` of the objective, without gradients; `where`: the sums' sharding."""
    return jax.jit(
        lambda trained, batch, base: train.objective.loss(cfg, train.surgery.attach(cfg, base, trained), batch)[1],
        out_shardings=where,
    )
