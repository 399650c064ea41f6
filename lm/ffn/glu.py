"""Gated feed-forward layers (arXiv 2002.05202): ``down(act(gate x) * up x)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax

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
        return _GLU(cfg, type(self).activation, self.bias, name=name)


@dataclass(frozen=True)
class GeGLU(SwiGLU):
    """Gate activation: exact GELU."""

    activation: ClassVar[Activation] = staticmethod(functools.partial(jax.nn.gelu, approximate=False))


@dataclass(frozen=True)
class GeGLUTanh(SwiGLU):
    """Gate activation: GELU's tanh approximation."""

    activation: ClassVar[Activation] = staticmethod(functools.partial(jax.nn.gelu, approximate=True))


class _GLU(nn.Module):
    cfg: Model
    activation: Activation
    bias: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer: LayerInputs | None = None) -> LayerOut:
        D, F, watch = self.cfg.d_model, self.cfg.d_ff, NOTHING if layer is None else layer.watch
        gate = Project((D, F), 1, self.bias, self.cfg, IN, name="gate")(x_BTD, watch)
        up = Project((D, F), 1, self.bias, self.cfg, IN, name="up")(x_BTD, watch)
        down = nn.checkpoint(_Down, static_argnums=(3,))
        return LayerOut(down((F, D), 1, self.bias, self.cfg, OUT, self.activation, name="down")(gate, up, watch))


class _Down(Project):
    """``(act(gate) * up) @ kernel``. The gradient keeps `gate` and `up` and computes the elementwise part again, which
    is cheaper than to store its steps (a third of a layer's activations)."""

    activation: Activation

    @nn.compact
    def __call__(self, gate: jax.Array, up: jax.Array, watch: Watch) -> jax.Array:  # type: ignore[override]
        return Project.__call__(self, self.activation(gate) * up, watch)
