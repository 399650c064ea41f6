"""Every feed-forward layer against its formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.plug_case import KindCase

from lm.config import model_config, plug
from lm.plug import table

D, F = 6, 10
CFG = model_config({"d_model": D, "n_heads": 1, "d_ff": F})


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "geglu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "relu2": lambda x: np.where(x > 0, x, 0.0) ** 2,
}
GATED = {"swiglu", "geglu", "geglu_tanh", "clamped_swiglu"}


def test_every_layer_has_an_oracle() -> None:
    assert set(ACTIVATIONS) | {"clamped_swiglu", "moe"} == set(table("lm.ffn"))  # mixtures: test_routers.py


def _inner(name: str, gate: Any, up: Any) -> Any:
    if name == "clamped_swiglu":
        g = np.minimum(gate, 1.5)
        return (np.clip(up, -1.5, 1.5) + 1) * g / (1 + np.exp(-0.7 * g))
    return ACTIVATIONS[name](gate) * up if name in GATED else ACTIVATIONS[name](up)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "clamped_swiglu"])
def test_formula(name: str, bias: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    if name not in GATED:
        del shapes["gate"]
    p = {
        n: {"kernel": rng.normal(size=s), **({"bias": rng.normal(size=s[1])} if bias else {})}
        for n, s in shapes.items()
    }
    x = rng.normal(size=(2, 5, D))

    def linear(n: str, x: np.ndarray) -> Any:
        return x @ p[n]["kernel"] + (p[n]["bias"] if bias else 0.0)

    inner = _inner(name, linear("gate", x) if name in GATED else None, linear("up", x))
    settings = {"alpha": 0.7, "limit": 1.5} if name == "clamped_swiglu" else {}
    module = plug("lm.ffn", {"name": name, "bias": bias, **settings}, "ffn").module(CFG)
    shapes_of = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    assert jax.tree.map(lambda a: a.shape, shapes_of) == jax.tree.map(lambda a: a.shape, p)
    out = module.apply({"params": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out.x, linear("down", inner), rtol=0, atol=1e-4)


def test_the_gelus_differ_and_relu_has_no_gradient_at_rest() -> None:
    x = np.linspace(-3, 3, 101)
    assert 1e-4 < np.abs(ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_tanh"](x)).max() < 1e-3
    for name in ("relu", "relu2"):
        slope = jax.grad(table("lm.ffn")[name].activation)
        assert [float(slope(v)) for v in (-1.0, 0.0, 2.0)] == [0.0, 0.0, 1.0 if name == "relu" else 4.0]


@pytest.mark.smoke
class TestGelu(KindCase):
    """The generic suite on the plain layers; the gated ones are its baseline."""

    change = {"ffn": {"name": "gelu_tanh"}}
    training_free = False
