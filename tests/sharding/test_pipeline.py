"""Layers in stages: the schedule's program, and what does not fit is named. Results: tests/sharding/test_layouts.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.bases import mt_nlg_530b_pipeline
from lm.aot import chips
from lm.aot.hlo import collectives
from lm.config import build, model_config
from lm.errors import UserError
from lm.model import params
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.objectives.forward import HIDDEN
from lm.sharding import Layout, run_stack
from lm.sharding.layout import using
from lm.sharding.pipeline import bubble, check
from lm.train.config import TrainConfig
from lm.train.placement import Placement

SIZES = {"vocab_size": 32, "d_model": 16, "n_layers": 4, "n_heads": 4, "d_ff": 32, "max_positions": 16}


def train(batch: int = 8, **mesh: Any) -> TrainConfig:
    return build(TrainConfig, {"batch": batch, "data": {"seq_len": 8}, "mesh": mesh}, "train")


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 3), (2, 4), (4, 2), (4, None)])
def test_layers_in_order_and_rows_with_what_belongs_to_them(stages: int, microbatches: int | None) -> None:
    """``x -> a x + r`` does not commute: eight layers, and a number r for every row. What layers say, ``a sum x``,
    adds up over microbatches. Gradients too."""
    a = jnp.linspace(0.5, 1.5, 8)
    B = 12 if microbatches == 3 else 8
    x = jax.random.normal(jax.random.key(0), (B, 3, 2))
    r = (jnp.arange(float(B)) % 8)[:, None] + jnp.arange(3.0)

    def run(x: jax.Array, a: jax.Array) -> Any:
        def body(x: jax.Array, r: jax.Array, a: jax.Array) -> Any:
            return a * x + r[..., None], a * x.sum()

        return run_stack(body, x, r, a, lambda said: said.sum(0))

    def both(x: jax.Array, a: jax.Array) -> Any:
        y, pull = jax.vjp(run, x, a)
        return y, pull(jax.tree.map(lambda y: 2 + jnp.cos(jnp.arange(float(y.size))).reshape(y.shape), y))

    want = jax.jit(lambda x, a: both(x, a))(x, a)
    expected = np.asarray(x)
    for factor in np.asarray(a):
        expected = factor * expected + np.asarray(r)[..., None]
    np.testing.assert_allclose(want[0][0], expected, rtol=1e-5)
    layout = Layout(data=1, fsdp=8 // stages, stage=stages, microbatches=microbatches)
    if B // (microbatches or stages) % (8 // stages):
        layout = Layout(data=1, sequence=1, tensor=8 // stages, stage=stages, microbatches=microbatches)
    with using(layout, layout.mesh()):
        compiled = jax.jit(lambda x, a: both(x, a)).lower(x, a).compile()
    for got, one in zip(jax.tree.leaves(compiled(x, a)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-5, atol=1e-5)


def test_random_layers_draw_anew_for_every_microbatch() -> None:
    """Four layers that add a number of their own: four microbatches get four sums, a whole batch gets one."""
    keys, x = jax.random.split(jax.random.key(0), 4), jnp.zeros((8, 2, 1))

    def run(x: jax.Array) -> jax.Array:
        return run_stack(lambda x, _, key: (x + jax.random.normal(key), None), x, (), keys, lambda said: said)[0]

    assert len(np.unique(jax.jit(lambda x: run(x))(x))) == 1
    layout = Layout(data=1, stage=4, tensor=2)
    with using(layout, layout.mesh()):
        assert len(np.unique(np.asarray(jax.jit(lambda x: run(x))(x)).round(4))) == 4


def test_a_stage_holds_its_layers_and_passes_on_its_rows() -> None:
    """Parameters are not gathered over stages; what is passed on is a microbatch of hidden states, M + S - 1 times."""
    cfg, settings = model_config(SIZES), train(data=1, stage=4, tensor=2, microbatches=4)
    place = Placement(cfg, settings)
    whole = params.abstract(cfg)
    where = place.shardings(whole)
    shares = {
        s.shard_shape(leaf.shape)[0]
        for leaf, s in zip(*map(jax.tree.leaves, (whole["blocks"], where["blocks"])), strict=True)
    }
    assert shares == {1}

    def hidden(p: Any, tokens: jax.Array) -> jax.Array:
        return DecoderModel(cfg).apply(p, Inputs(tokens), watch=HIDDEN).hidden_BTD

    assert place.rows.shard_shape((8, 8)) == (2, 8)  # rows outside the stages are cut over them
    with using(place.layout_around_stages, place.mesh):
        fn = jax.jit(hidden, in_shardings=(where, place.rows))
        text = fn.lower(whole, jax.ShapeDtypeStruct((8, 8), "int32")).compile().as_text()
    permutes = [c for c in collectives(text, 8) if c.kind == "collective-permute"]
    state = 2 * 8 * 16 * 4  # two rows of eight tokens of sixteen float32
    assert any(c.sent == state and c.times == 4 + 4 - 1 for c in permutes)
    kernels = {f"f32[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(whole["blocks"]) if x.ndim > 2}
    assert not any(" all-gather(" in line and shape in line for line in text.splitlines() for shape in kernels)


def test_bubble() -> None:
    assert bubble(1, 8) == 0 and bubble(4, 4) == 3 / 7 and bubble(35, 280) == pytest.approx(34 / 314)


def test_the_layout_of_a_published_pipeline_divides() -> None:
    """MT-NLG 530B in 8 replicas of 35 stages of 8 chips, one row a microbatch: the paper's 240 microbatches a replica,
    to the next multiple of the stages, and so its bubble."""
    base = mt_nlg_530b_pipeline
    cfg, settings = model_config(base.model()), build(TrainConfig, base.train(), "train")
    axes = params.axes(cfg)
    names = {name: (leaf.shape, axes[name]) for name, leaf in params.names(params.abstract(cfg)).items()}
    layout, sizes = settings.mesh, settings.mesh.sizes(chips.count(base.POD))
    M = layout.in_flight(35)
    assert (sizes["data"], sizes["stage"], sizes["tensor"], M) == (8, 35, 8, 245)
    layout.check(names, sizes)
    check(cfg.layers(), 35, settings.batch, layout.parts("batch", sizes), M, cfg.scan_layers)
    assert settings.batch == 8 * M and layout.layout_around_stages(sizes).parts("batch", sizes) == 8 * 35
    assert bubble(35, M) == 34 / 279 and bubble(35, 240) == 34 / 274


OTHER = {"layer_overrides": ({"layers": "2:3", "pattern": {"name": "sliding_window", "window": 4}},)}


@pytest.mark.parametrize(
    ("model", "mesh", "said"),
    [
        (OTHER, {"stage": 2}, r"train\.mesh\.stage: layer 2 differs from layer 0 in model\.pattern, and stages are"),
        (
            {"n_layers": 6},
            {"stage": 4},
            r"train\.mesh\.stage: 4 does not divide model\.n_layers = 6; valid: 1, 2, 3",
        ),
        ({"scan_layers": False}, {"stage": 2}, r"train\.mesh\.stage: 2 stages need stacked layers; valid: model\.scan"),
        (
            {},
            {"data": 4, "stage": 2, "microbatches": 4},
            r"train\.mesh\.microbatches: 4 does not divide the 2 rows of a device .*; valid: 1, 2",
        ),
        ({}, {"microbatches": 4}, r"train\.mesh\.microbatches: 4 without stages; valid: None, or a stage above 1"),
        ({}, {"stage": 2, "microbatches": 0}, r"train\.mesh\.microbatches: must be at least 1 or None, found 0"),
        ({}, {"stage": 3}, r"train\.mesh: data -1 x stage 3 does not fit 8 devices"),
    ],
)
def test_what_does_not_fit_is_named(model: dict[str, Any], mesh: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Placement(model_config({**SIZES, **model}), train(**mesh))
