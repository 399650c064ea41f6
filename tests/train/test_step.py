"""The training step: accumulation, packing, remat, jit, non-finite steps, and that it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import build, model_config
from lm.model import params
from lm.train import flops, step
from lm.train.config import TrainConfig

CFG = model_config({"vocab_size": 29, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_positions": 16})
TRAIN = build(TrainConfig, {"batch": 8, "steps": 50, "data": {"seq_len": 12}, "optimizer": {"name": "adamw"}}, "train")


def batch(rows: int = 8, length: int = 12, seed: int = 0) -> dict[str, jax.Array]:
    """Rows of two documents and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 29, (rows, length + 1))
    cut, end = rng.integers(2, length - 3, (rows, 1)), rng.integers(length - 2, length + 1, (rows, 1))
    at = np.arange(length)
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0))
    index = np.where(at < cut, at, np.where(at < end, at - cut, -1))
    last = (at == cut - 1) | (at >= end - 1)
    out = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "index": index}
    return {k: jnp.asarray(v, jnp.int32) for k, v in out.items()} | {"weights": jnp.asarray(~last, jnp.float32)}


@pytest.fixture(scope="module")
def weights() -> Any:
    return params.init(CFG, jax.random.key(1))


def close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_is_the_big_batch(weights: Any, parts: int) -> None:
    rows = batch()
    whole, sums = jax.jit(lambda p, b: step.gradients(CFG, TRAIN, p, b))(weights, rows)
    cut = dataclasses.replace(TRAIN, accumulate=parts)
    found, found_sums = jax.jit(lambda p, b: step.gradients(CFG, cut, p, b))(weights, rows)
    close(found, whole)
    close(found_sums, sums)
    assert len({float(w) for w in rows["weights"].sum(1)}) > 1  # parts of unequal weight, or the test shows little


def test_packed_documents_train_as_separate_rows(weights: Any) -> None:
    rows = batch(rows=3)
    run = jax.jit(lambda p, b: step.gradients(CFG, TRAIN, p, b))
    packed, sums = run(weights, rows)
    apart: dict[str, list[Any]] = {k: [] for k in rows}
    for r in range(3):
        for document in (1, 2):
            mine = np.flatnonzero(np.asarray(rows["segments"][r]) == document)
            n = len(mine)
            for k in ("inputs", "targets", "weights"):
                apart[k].append(np.pad(np.asarray(rows[k][r])[mine], (0, 12 - n)))
            apart["segments"].append(np.pad(np.ones(n, np.int32), (0, 12 - n)))
            apart["index"].append(np.pad(np.arange(n), (0, 12 - n), constant_values=-1))
    split = {k: jnp.asarray(np.stack(v), rows[k].dtype) for k, v in apart.items()}
    found, found_sums = run(weights, split)
    close(found, packed, atol=2e-6)
    assert float(found_sums["nll"]) == pytest.approx(float(sums["nll"]), rel=1e-6)


@pytest.mark.smoke
def test_remat_and_jit_change_nothing(weights: Any) -> None:
    rows = batch()
    state = step.initial(CFG, TRAIN, weights)
    plain, metrics = step.step(CFG, TRAIN, state, rows)
    compiled, compiled_metrics = jax.jit(lambda s, b: step.step(CFG, TRAIN, s, b))(state, rows)
    remat = dataclasses.replace(CFG, remat=True)
    again, _ = jax.jit(lambda s, b: step.step(remat, TRAIN, s, b))(state, rows)
    for other in (compiled, again):
        close(other["params"], plain["params"], atol=2e-5)
    close(compiled_metrics, metrics)
    assert int(plain["step"]) == 1 and bool(metrics["ok"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_only_the_counters(weights: Any, bad: float) -> None:
    rows = batch()
    state = step.initial(CFG, TRAIN, weights)
    run = jax.jit(lambda s, b: step.step(CFG, TRAIN, s, b))
    state, _ = run(state, rows)
    poisoned = {**rows, "weights": rows["weights"].at[0, 0].set(bad)}
    after, metrics = run(state, poisoned)
    jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
    jax.tree.map(np.testing.assert_array_equal, after["opt"], state["opt"])
    assert not bool(metrics["ok"]) and [int(after[k]) for k in ("step", "skipped", "run")] == [2, 1, 1]
    after, _ = run(after, poisoned)
    after, metrics = run(after, rows)
    assert [int(after[k]) for k in ("step", "skipped", "run")] == [4, 2, 0] and bool(metrics["ok"])


def test_it_learns_what_can_be_learned() -> None:
    """The next token is a function of the last: a loss near 0 is within reach, log 29 = 3.4 is where it starts."""
    train = build(
        TrainConfig,
        {
            "batch": 8,
            "steps": 150,
            "data": {"seq_len": 12},
            "optimizer": {"name": "adamw", "learning_rate": 0.02},
            "schedule": {"name": "cosine", "warmup": 0.1},
        },
        "train",
    )
    run = jax.jit(lambda s, b: step.step(CFG, train, s, b), donate_argnums=0)
    state = step.initial(CFG, train, params.init(CFG, jax.random.key(0)))
    rng, losses = np.random.default_rng(0), []
    for _ in range(150):
        rows = [rng.integers(0, 29, 8)]
        for _ in range(12):
            rows.append((rows[-1] * 3 + 1) % 29)
        tokens = jnp.asarray(np.stack(rows, 1), jnp.int32)
        data = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((8, 12))}
        state, metrics = run(state, data)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 3.0 and losses[-1] < 0.1


def test_bfloat16_compute_keeps_float32_parameters(weights: Any) -> None:
    half = dataclasses.replace(CFG, dtype="bfloat16")
    state = step.initial(CFG, TRAIN, weights)
    after, metrics = jax.jit(lambda s, b: step.step(half, TRAIN, s, b))(state, batch())
    full, full_metrics = jax.jit(lambda s, b: step.step(CFG, TRAIN, s, b))(state, batch())
    assert {x.dtype for x in jax.tree.leaves(after["params"])} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert float(metrics["loss"]) == pytest.approx(float(full_metrics["loss"]), rel=2e-2)
    assert float(metrics["loss"]) != float(full_metrics["loss"])


def test_flops_by_the_compilers_count() -> None:
    """Without attention's quadratic part and element-wise work the two counts are the same products."""
    cfg = model_config(
        {
            "vocab_size": 512,
            "d_model": 64,
            "n_layers": 3,
            "n_heads": 4,
            "n_kv_heads": 2,
            "d_ff": 192,
            "scan_layers": False,
        }
    )
    T = 8
    weights = params.abstract(cfg)
    rows = {k: jax.ShapeDtypeStruct((4, T), v.dtype) for k, v in batch(4, T).items() if k != "segments"}
    train = dataclasses.replace(TRAIN, objective=dataclasses.replace(TRAIN.objective, chunk=0))
    compiled = jax.jit(lambda p, b: step.gradients(cfg, train, p, b)).lower(weights, rows).compile()
    counted = compiled.cost_analysis()["flops"]
    assert counted == pytest.approx(4 * T * flops.per_token(cfg, T), rel=0.15)


def test_llama_2_7b_costs_six_flops_per_weight() -> None:
    from configs.bases import llama2_7b

    cfg = model_config(llama2_7b.model())
    weights = params.count(params.abstract(cfg)) - 32000 * 4096  # the embedding is looked up
    short = flops.per_token(cfg, 2)
    assert short == pytest.approx(6 * weights, rel=1e-3)
    assert flops.per_token(cfg, 4096) - short == pytest.approx(6 * 32 * 4096 * 4096, rel=1e-3)
