"""Gated feed-forward layers (arXiv 2002.05202): ``down(act(gate x) * up x)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.ffn.base import Activated
from lm.layer import LayerInputs, LayerOut
from lm.plug import Model
from lm.watch import Watch
from lm.weights.project import Project

IN, OUT = ("embed", "mlp"), ("mlp", "embed")
NOTHING = Watch()
Activation = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class SwiGLU(Activated):
    """Gate activation: SiLU."""

    bias: bool = False
    activation: ClassVar[Activation] = staticmethod(jax.nn.silu)

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        return _GLU(cfg, self, name=name)


@dataclass(frozen=True)
class GeGLU(SwiGLU):
    """Gate activation: exact GELU."""

    activation: ClassVar[Activation] = staticmethod(functools.partial(jax.nn.gelu, approximate=False))


@dataclass(frozen=True)
class GeGLUTanh(SwiGLU):
    """Gate activation: GELU's tanh approximation."""

    activation: ClassVar[Activation] = staticmethod(functools.partial(jax.nn.gelu, approximate=True))


@dataclass(frozen=True)
class ClampedSwiGLU(SwiGLU):
    """``down((up x + 1) * g sigmoid(alpha g))`` with ``g = gate x``, g at most `limit` and up within it on both sides
    (gpt-oss, arXiv 2508.10925)."""

    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.limit > 0:
            raise UserError(f"model.ffn.limit: must be positive, found {self.limit}")

    def opened(self, x: jax.Array) -> jax.Array:
        g = jnp.minimum(x, self.limit)
        return g * jax.nn.sigmoid(self.alpha * g)

    def passed(self, up: jax.Array) -> jax.Array:
        return jnp.clip(up, -self.limit, self.limit) + 1.0


class _GLU(nn.Module):
    cfg: Model
    plug: SwiGLU

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer: LayerInputs | None = None) -> LayerOut:
        D, F, watch, bias = self.cfg.d_model, self.cfg.d_ff, NOTHING if layer is None else layer.watch, self.plug.bias
        gate = Project((D, F), 1, bias, self.cfg, IN, name="gate")(x_BTD, watch)
        up = Project((D, F), 1, bias, self.cfg, IN, name="up")(x_BTD, watch)
        down = nn.checkpoint(_Down, static_argnums=(3,))
        return LayerOut(down((F, D), 1, bias, self.cfg, OUT, self.plug, name="down")(gate, up, watch))


class _Down(Project):
    """``(act(gate) * up) @ kernel``. The gradient keeps `gate` and `up` and computes the elementwise part again, which
    is cheaper than to store its steps (a third of a layer's activations)."""

    plug: SwiGLU

    @nn.compact
    def __call__(self, gate: jax.Array, up: jax.Array, watch: Watch) -> jax.Array:  # type: ignore[override]
        return Project.__call__(self, self.plug.inner(up, gate), watch)
