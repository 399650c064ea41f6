"""Every layout of the mesh gives one device's step, on the production path; what does not fit is named."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import optimizers
from lm.config import ModelConfig, build, model_config
from lm.errors import UserError
from lm.model import params
from lm.sharding import AXES, RULES, Layout, constrain
from lm.train import step
from lm.train.config import TrainConfig
from lm.train.placement import Placement
from lm.train.step import ALONE

SIZES = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 32, "max_positions": 16}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**SIZES, "n_kv_heads": 2, "remat": True},
    "untied": {
        **SIZES,
        "head": {"name": "linear", "tie": False},
        "mixer": {"name": "softmax", "backend": "blocked", "softcap": 3.0},
        "pattern": {"name": "sliding_window", "window": 3},
    },
    "latent": {
        **SIZES,
        "head_dim": 2,
        "mixer": {"name": "mla", "kv_rank": 8, "q_rank": 8, "nope_dim": 4, "v_dim": 4},
    },
    "moe": {**SIZES, "ffn": {"name": "moe", "experts": 4, "d_expert": 16, "shared": 16, "router_z_loss": 1e-3}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8, "rules": {"kv_heads": None, "heads": None}},
    "sequence": {"sequence": 4, "data": 2},
    "expert": {"expert": 4},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data x sequence x tensor": {"data": 2, "sequence": 2, "tensor": 2},
    "fsdp x expert x tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "data x stage": {"stage": 2, "microbatches": 1},
    "data x stage x tensor": {"data": 2, "stage": 2, "tensor": 2, "microbatches": 4},
    "stage x tensor, the stream cut": {
        **{"data": 2, "stage": 2, "tensor": 2, "microbatches": 2},
        "rules": {"stream": ("sequence", "tensor")},
    },
    "stage x sequence": {"data": 2, "stage": 2, "sequence": 2},
}
AXIS_BY_AXIS = [
    *(("dense", name) for name in ("data", "fsdp", "tensor", "sequence", "data x stage", "data x stage x tensor")),
    ("untied", "stage x sequence"),
    ("latent", "data x fsdp x tensor"),
    ("moe", "expert"),
]
PRODUCTS = [
    *(("dense", name) for name in ("data x fsdp x tensor", "stage x tensor, the stream cut")),
    ("untied", "data x sequence x tensor"),
    *(("moe", name) for name in ("sequence", "fsdp x expert x tensor", "data x stage")),
]
SMOKE = ("dense", "data x stage x tensor")
CASES = [
    *(pytest.param(*case, marks=[pytest.mark.smoke] if case == SMOKE else []) for case in AXIS_BY_AXIS),
    *(pytest.param(*case, marks=pytest.mark.nightly) for case in PRODUCTS),
]
assert {name for _, name in AXIS_BY_AXIS + PRODUCTS} == set(LAYOUTS)
assert {name for name, _ in AXIS_BY_AXIS} == set(MODELS)


@functools.cache
def model(name: str) -> ModelConfig:
    return model_config(MODELS[name])


def train(**mesh: Any) -> TrainConfig:
    # No momentum and no schedule: the step is -rate times the gradient, which the new parameters therefore show.
    return build(
        TrainConfig,
        {
            "batch": 16,
            "accumulate": 2,
            "clip": None,
            "data": {"seq_len": 8},
            "optimizer": {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.0},
            "schedule": "constant",
            "mesh": mesh,
        },
        "train",
    )


def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (16, 9)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((16, 8), np.float32)}


def initial(name: str) -> Any:
    whole, settings = params.init(model(name), jax.random.key(1)), train()
    return step.initial(model(name), settings, whole, 0 if step.draws(model(name), settings) else None)


@functools.cache
def alone(name: str) -> Any:
    run = jax.jit(lambda s, b: step.step(model(name), train(), s, b))
    return jax.device_get(run(initial(name), {k: jnp.asarray(v) for k, v in rows().items()}))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_layout_gives_the_step_of_one_device(name: str, layout: str) -> None:
    """Parameters, Adam's first moments (the gradients over ten) and metrics, to float32 rounding."""
    place = Placement(model(name), train(**LAYOUTS[layout]))
    assert place.mesh.size == 8
    state = initial(name)
    where = place.shardings(state)
    spread, batch = jax.device_put(state, where), place.batch(rows())
    after, metrics = place.compile(spread, batch)(spread, batch, ALONE)
    want, want_metrics = alone(name)
    assert float(metrics["loss"]) == pytest.approx(float(want_metrics["loss"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(want_metrics["grad_norm"]), rel=1e-5)
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(after["opt"]) if "mu" in str(path)]
    wanted = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(want["opt"]) if "mu" in str(path)]
    assert len(moments) == len(jax.tree.leaves(state["params"]))
    for got, expected in zip(moments, wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * max(float(np.abs(expected).max()), 1e-3) + 1e-9)
    jax.tree.map(
        lambda got, s: s.is_equivalent_to(got.sharding, got.ndim) or pytest.fail(str(got.sharding)), after, where
    )


def test_what_is_cut_is_held_in_parts() -> None:
    """A device holds its share of a parameter and of both moments: an eighth under fsdp x tensor x expert."""
    place = Placement(model("moe"), train(**LAYOUTS["fsdp x expert x tensor"]))
    state = jax.eval_shape(lambda: initial("moe"))
    where = place.shardings(state)
    flat = jax.tree_util.tree_leaves_with_path(state)
    share = {
        jax.tree_util.keystr(path): np.prod(s.shard_shape(leaf.shape)) / max(np.prod(leaf.shape), 1)
        for (path, leaf), s in zip(flat, jax.tree.leaves(where), strict=True)
    }
    experts = [v for k, v in share.items() if "'experts'" in k]
    assert len(experts) == 9 and set(experts) == {1 / 8}  # gate, up, down; parameters and two moments
    assert {v for k, v in share.items() if k.endswith("['attn']['q']['kernel']")} == {1 / 4}
    assert {v for k, v in share.items() if k.endswith("['scale']")} == {1 / 2}


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ({"data": 3}, r"train\.mesh: data 3 does not fit 8 devices; valid: a product of 8"),
        ({"fsdp": -1}, r"train\.mesh: data, fsdp are -1; valid: one axis at most"),
        ({"tensor": 0}, r"train\.mesh\.tensor: must be at least 1, or -1 for what is left, found 0"),
        ({"tenser": 2}, r"train\.mesh\.tenser: unknown key \(did you mean 'tensor'\?\)"),
        ({"rules": {"head": "tensor"}}, r"train\.mesh\.rules\.head: unknown name 'head' \(did you mean 'heads'\?\)"),
        ({"rules": {"heads": "tensors"}}, r"train\.mesh\.rules\.heads: found 'tensors' \(did you mean 'tensor'\?\)"),
        (
            {"tensor": 8},
            r"train\.mesh: axis 2 of blocks/attn/k/kernel \(kv_heads, 2\) does not divide by 8 \(tensor 8\); valid: "
            r"1, 2 devices, or train\.mesh\.rules\.kv_heads=None to keep it whole",
        ),
        ({"sequence": 16, "data": 1}, r"train\.mesh: sequence 16 does not fit 8 devices"),
        (
            {"data": 1, "sequence": 8, "rules": {"length": ["sequence", "data"]}},
            None,
        ),
    ],
)
def test_what_does_not_fit_is_named(mesh: dict[str, Any], said: str | None) -> None:
    if said is None:
        Placement(model("dense"), train(**mesh))
        return
    with pytest.raises(UserError, match=said):
        Placement(model("dense"), train(**mesh))


def test_rows_and_tokens_that_do_not_spread_are_refused() -> None:
    settings = build(TrainConfig, {"batch": 12, "data": {"seq_len": 8}}, "train")
    with pytest.raises(
        UserError, match=r"train\.batch: 12 rows in 1 parts are not divisible by 8 devices \(data 8\); valid"
    ):
        Placement(model("dense"), settings)
    settings = build(TrainConfig, {"batch": 8, "data": {"seq_len": 9}, "mesh": {"sequence": 2}}, "train")
    with pytest.raises(
        UserError, match=r"train\.data\.seq_len: 9 tokens are not divisible by 2 devices \(sequence 2\)"
    ):
        Placement(model("dense"), settings)


def test_the_layout_is_no_part_of_a_runs_identity() -> None:
    assert train().determines() == train(fsdp=8).determines()
    declared = {axis for name in MODELS for axis in params.axes(model(name)).used()}
    assert set(RULES) - {"batch", "length", "slots", "stream"} <= declared
    assert {axis for axis in declared if Layout().axes_of(axis)} == set(RULES) & declared  # others: whole everywhere
    assert all(set(axes) <= set(AXES) for axes in RULES.values())


def test_one_mesh_axis_serves_one_axis_of_an_array() -> None:
    spec = Layout(rules={"embed": ("fsdp", "tensor")}).spec(("embed", "mlp", None, "positions"))
    assert spec == jax.sharding.PartitionSpec(("fsdp", "tensor"), None, None, None)
    x = jnp.ones((3, 4))
    assert constrain(x, "batch", None) is x  # nothing outside a layout


@pytest.mark.parametrize("name", optimizers.TABLE)
def test_what_an_optimizer_keeps_of_a_parameter_lies_with_it(name: str) -> None:
    """Moments below a parameter's name and above it (a state per tensor): none is whole on every device."""
    cfg = model("dense")
    settings = {"batch": 8, "data": {"seq_len": 8}, "mesh": {"data": 1, "fsdp": 8}, "optimizer": {"name": name}}
    train = build(TrainConfig, settings, "train")
    place = Placement(cfg, train, jax.devices())
    whole = params.abstract(cfg)
    state = jax.eval_shape(lambda p: step.initial(cfg, train, p), whole)
    cut = {leaf.shape: x.spec for leaf, x in zip(*map(jax.tree.leaves, (whole, place.shardings(whole))), strict=True)}
    kept = list(zip(*map(jax.tree.leaves, (state["opt"], place.shardings(state["opt"]))), strict=True))
    found = [(leaf.shape, x.spec) for leaf, x in kept if leaf.shape in cut]
    assert all(spec == cut[shape] for shape, spec in found)
    assert len(found) >= len(cut)
