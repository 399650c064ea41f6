"""Norms against their equations in float64, forward and gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import plug
from lm.plug import table

D = 12


PLUGS: dict[str, dict[str, Any]] = {**{name: {"name": name} for name in table("lm.norms")}}
PLUGS["rmsnorm, unit offset"] = {"name": "rmsnorm", "unit_offset": True}


def by_equation(name: str, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    if name.startswith("rmsnorm"):
        scale = 1 + scale if "offset" in name else scale
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale)
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias)


@pytest.mark.parametrize("name", PLUGS)
def test_equation(name: str) -> None:
    """On numbers of which epsilon, mean and scale are a good part; bfloat16 in is bfloat16 out, by float32 inside."""
    rng = np.random.default_rng(0)
    x, scale, bias, eps = rng.normal(0.7, 0.5, (3, D)), rng.normal(size=D), rng.normal(size=D), 0.3
    module = plug("lm.norms", {**PLUGS[name], "eps": eps}, "norm").module("float32")
    params = {"scale": jnp.asarray(scale, jnp.float32)}
    if name == "layernorm":
        params["bias"] = jnp.asarray(bias, jnp.float32)

    @jax.jit
    def run(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def y(x: jax.Array) -> jax.Array:
            return module.apply({"params": params}, x)

        return y(x), jax.grad(lambda x: jnp.sin(3 * y(x)).sum())(x), y(x.astype(jnp.bfloat16))

    got, slope, half = run(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, by_equation(name, x, scale, bias, eps), rtol=0, atol=1e-5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(half), got, rtol=0, atol=0.05)
    for at in np.ndindex(1, D):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * 1e-6
            ends.append(np.sin(3 * by_equation(name, moved, scale, bias, eps)).sum())
        assert abs(float(slope[at]) - (ends[0] - ends[1]) / 2e-6) <= 1e-4


def test_fresh_parameters_change_nothing() -> None:
    for name, settings in PLUGS.items():
        norm = plug("lm.norms", settings, "norm")
        made = norm.module("float32").init(jax.random.key(0), jnp.ones((1, D)))["params"]
        want = {"scale": 1.0, "bias": 0.0} if name == "layernorm" else {"scale": 0.0 if "offset" in name else 1.0}
        assert {k: float(v.mean()) for k, v in made.items()} == want
