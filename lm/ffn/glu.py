"""Gated feed-forward layers (arXiv 2002.05202): ``down(act(gate x) * up x)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax

from lm.config import ModelConfig
from lm.weights.project import Project

AXES = {
    "gate/kernel": ("embed", "mlp"),
    "gate/bias": ("mlp",),
    "up/kernel": ("embed", "mlp"),
    "up/bias": ("mlp",),
    "down/kernel": ("mlp", "embed"),
    "down/bias": ("embed",),
}

Activation = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class SwiGLU:
    """Gate activation: SiLU."""

    bias: bool = False
    activation: ClassVar[Activation] = staticmethod(jax.nn.silu)

    def module(self, cfg: ModelConfig, name: str | None = None) -> nn.Module:
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
    cfg: ModelConfig
    activation: Activation
    bias: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = self.cfg.d_model, self.cfg.d_ff
        gate = Project((D, F), 1, self.bias, self.cfg, name="gate")(x_BTD)
        up = Project((D, F), 1, self.bias, self.cfg, name="up")(x_BTD)
        return nn.checkpoint(_Down)((F, D), 1, self.bias, self.cfg, self.activation, name="down")(gate, up)


class _Down(Project):
    """``(act(gate) * up) @ kernel``. The gradient keeps `gate` and `up` and computes the elementwise part again, which
    is cheaper than to store its steps (a third of a layer's activations)."""

    activation: Activation

    @nn.compact
    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:  # type: ignore[override]
        return Project.__call__(self, self.activation(gate) * up)
