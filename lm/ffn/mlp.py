"""Plain feed-forward layers: ``down(act(up x))``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.ffn.base import Activated
from lm.ffn.glu import IN, NOTHING, OUT
from lm.layer import LayerInputs, LayerOut
from lm.plug import Model
from lm.weights.project import Project

Activation = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Gelu(Activated):
    """Exact GELU (arXiv 1606.08415)."""

    bias: bool = True
    activation: ClassVar[Activation] = staticmethod(functools.partial(jax.nn.gelu, approximate=False))

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        return _MLP(cfg, type(self).activation, self.bias, name=name)


@dataclass(frozen=True)
class GeluTanh(Gelu):
    """GELU's tanh approximation (GPT-2's ``gelu_new``)."""

    activation: ClassVar[Activation] = staticmethod(functools.partial(jax.nn.gelu, approximate=True))


@dataclass(frozen=True)
class Relu(Gelu):
    """ReLU."""

    activation: ClassVar[Activation] = staticmethod(jax.nn.relu)


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


@dataclass(frozen=True)
class Relu2(Gelu):
    """Squared ReLU (arXiv 2109.08668)."""

    activation: ClassVar[Activation] = staticmethod(_relu2)


class _MLP(nn.Module):
    cfg: Model
    activation: Activation
    bias: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer: LayerInputs | None = None) -> LayerOut:
        D, F, watch = self.cfg.d_model, self.cfg.d_ff, NOTHING if layer is None else layer.watch
        up = Project((D, F), 1, self.bias, self.cfg, IN, name="up")(x_BTD, watch)
        return LayerOut(Project((F, D), 1, self.bias, self.cfg, OUT, name="down")(self.activation(up), watch))
