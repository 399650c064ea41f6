"""Embeddings whose table is cut along the width: rows for columns, the same numbers, and no whole table anywhere."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lm.sharding import Layout, gather_after
from lm.sharding.layout import using
from lm.weights import lookup as table
from lm.weights.lookup import lookup

V, D, B, T = 50, 16, 8, 12
LAYOUTS = {
    "fsdp": Layout(data=1, fsdp=8),
    "fsdp x expert": Layout(data=1, fsdp=4, expert=2),
    "data x fsdp x sequence": Layout(data=2, fsdp=2, sequence=2),
    "fsdp x tensor": Layout(data=1, fsdp=4, tensor=2),
}


@pytest.mark.parametrize("piece", [2**20, 20])
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_rows_and_same_gradient(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PIECE", piece)
    layout, rng = LAYOUTS[name], np.random.default_rng(0)
    mesh = layout.mesh()
    rows = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    where = [NamedSharding(mesh, layout.spec(names)) for names in (("vocab", "embed"), ("batch", "length"))]
    where.append(NamedSharding(mesh, layout.spec(("batch", "length", None))))

    def loss(rows: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = lookup(rows, ids, jnp.float32)
        return (found * weights).sum(), found

    def both(*x: jax.Array) -> tuple[jax.Array, jax.Array]:
        (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(*x)
        return found, gradient

    placed = [jax.device_put(x, w) for x, w in zip((rows, ids, weights), where, strict=True)]
    with using(layout, mesh):
        lowered = jax.jit(both, out_shardings=(where[2], where[0])).lower(*placed)
        done = lowered.compile()
    found, gradient = done(*placed)
    np.testing.assert_array_equal(found, rows[ids])
    np.testing.assert_allclose(gradient, jnp.zeros((V, D)).at[ids].add(weights), rtol=0, atol=1e-5)
    # Nothing as wide as the table is as long as it, in either direction.
    vocab = V // mesh.shape["tensor"]
    whole = re.findall(rf"f32\[{vocab},{D}\]", done.as_text())
    assert not whole, name
    assert ("stablehlo.while" in lowered.as_text()) == (piece == 20)  # a compiler may make loops of its own


def test_pieces_divide_what_a_device_has_of_a_row() -> None:
    assert table.pieces(2**20, 4096) == 1
    assert table.pieces(2**24, 4096) == 16
    assert table.pieces(2**24, 4095) == 21  # 16 to 20 do not divide it
    assert table.pieces(2**24, 8) == 8  # shorter than that many


def test_without_a_layout_nothing_is_said() -> None:
    rows, ids = jnp.ones((V, D)), jnp.zeros((B, T), jnp.int32)
    text = jax.jit(lambda r, i: lookup(gather_after(r, i), i, r.dtype)).lower(rows, ids).as_text()
    assert "shard" not in text and "optimization_barrier" not in text


def test_parameters_wait_and_their_gradient_does_not() -> None:
    layout = LAYOUTS["fsdp"]
    mesh = layout.mesh()

    def loss(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = jnp.sin(x * p["a"])
        return (gather_after(p, y)["a"] * y).sum()

    p, x = {"a": jnp.arange(1.0, 5.0)}, jnp.linspace(0.1, 0.4, 4)
    with using(layout, mesh):
        gradient = jax.grad(loss, (0, 1))
        text = jax.jit(loss).lower(p, x).as_text()
        found = gradient(p, x)
    wanted = jax.grad(lambda p, x: (p["a"] * jnp.sin(x * p["a"])).sum(), (0, 1))(p, x)
    assert "optimization_barrier" in text and math.prod(mesh.shape.values()) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
