"""Experts on several devices: tokens travel to them and back, and the layer is the layer of one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.aot.hlo import collectives
from lm.attention.branches import Tokens
from lm.config import ModelConfig, model_config
from lm.errors import UserError
from lm.layer import LayerInputs
from lm.sharding import Layout
from lm.sharding.layout import using

B, T, D = 8, 6, 24
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropless": ({}, {"data": 2, "expert": 4}),
    "capacity of a row": ({"capacity": 0.6, "group": "sequence"}, {"fsdp": 2, "expert": 2, "tensor": 2}),
    "capacity of the batch, parts of rows": ({"capacity": 0.6}, {"data": 1, "sequence": 2, "expert": 4}),
}


def layer(**ffn: Any) -> ModelConfig:
    ffn = {"name": "moe", "experts": 8, "d_expert": 16, "router": {"name": "topk", "k": 2}, **ffn}
    return model_config({"d_model": D, "n_layers": 1, "n_heads": 4, "d_ff": 16, "ffn": ffn})


def inputs(index_BT: jax.Array, key: Any = None) -> LayerInputs:
    """What the layer may look at."""
    return LayerInputs(Tokens(index_BT, index_BT.astype(jnp.float32)), jnp.ones(()), key=key)


def program(cfg: ModelConfig) -> Any:
    """Output, report, and gradients of parameters and input; in training, where the capacity is."""
    layer = inputs(jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)), jax.random.key(2))

    def run(p: Any, x: jax.Array) -> Any:
        out = cfg.ffn.module(cfg).apply({"params": p}, x, layer)
        return (jnp.sin(out.x).sum() + out.report["loss"]), (out.x, out.report)

    return lambda p, x: jax.value_and_grad(run, (0, 1), has_aux=True)(p, x)


def both(cfg: ModelConfig, **mesh: Any) -> tuple[Any, Any, str]:
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    empty = inputs(jnp.zeros((B, T), jnp.int32))
    p = jax.jit(lambda: cfg.ffn.module(cfg).init(jax.random.key(1), x, empty)["params"])()
    p["router"]["kernel"] = 40.0 * p["router"]["kernel"]  # some experts are asked for more than others
    p["experts"] = jax.tree.map(lambda w: 10.0 * w, p["experts"])
    layout = Layout(**mesh)
    made = layout.mesh()
    rows = jax.sharding.NamedSharding(made, layout.spec(("batch", "length", None)))
    experts = jax.sharding.NamedSharding(made, layout.spec(("experts", None, None)))
    where = {**jax.tree.map(lambda _: None, p), "experts": jax.tree.map(lambda _: experts, p["experts"])}
    with using(layout, made):
        compiled = jax.jit(program(cfg), in_shardings=(where, rows)).lower(p, x).compile()
    args = jax.device_put((p, x), compiled.input_shardings[0])
    return jax.jit(program(cfg))(p, x), compiled(*args), compiled.as_text()


@pytest.mark.parametrize("name", CASES)
def test_a_layer_on_several_devices_is_that_of_one(name: str) -> None:
    ffn, mesh = CASES[name]
    want, got, text = both(layer(**ffn), **mesh)
    for path, one in jax.tree_util.tree_leaves_with_path(want):
        same = dict(jax.tree_util.tree_leaves_with_path(got))[path]
        np.testing.assert_allclose(same, one, rtol=2e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    sums = want[0][1][1]["sums"]
    assert (sums["kept"] == sums["chosen"]) == (name == "dropless")
    assert np.ptp(sums["counts_E"]) > 8
    found = collectives(text, 8)
    assert any(c.kind == "all-to-all" for c in found)
    if name == "dropless":
        whole = [f"f32[{B},{T},{D}]", f"f32[{B * T},{D}]", f"f32[{B // 2},{T},{D}]", f"f32[{B * T // 2},{D}]"]
        there, n = 4, B * T // 8 * 2  # rows for four devices, all assignments of a device for each
        rows, ids = there * n * D * 4, there * n * 4
        sent = sum(c.times * c.sent for c in found if c.kind == "all-to-all")
        assert sent == (4 * rows + ids) * 3 / 4  # there and back, the gradient back and there; ids once
        assert not any(" all-gather(" in line and any(s in line for s in whole) for line in text.splitlines())


def test_rows_beyond_the_bound_are_dropped_and_counted() -> None:
    want, got, _ = both(layer(), data=2, expert=4, exchange=1.0)
    (all_of, some) = (x[0][1][1]["sums"] for x in (want, got))
    assert float(all_of["kept"]) == B * T * 2 > float(some["kept"]) > B * T
    np.testing.assert_array_equal(all_of["counts_E"], some["counts_E"])
    want, got, _ = both(layer(), data=2, expert=4, exchange=4.0)  # all of a device's tokens to one other
    np.testing.assert_allclose(got[0][1][0], want[0][1][0], rtol=2e-5, atol=2e-5)


def test_bounds_that_there_are_not() -> None:
    with pytest.raises(UserError, match=r"train\.mesh\.exchange: must be positive, or None for no limit, found 0"):
        Layout(exchange=0.0)
