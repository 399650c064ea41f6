"""Normalisation layers. Statistics are taken in float32 whatever the compute type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.plug import Model, Plug, Table, later
from lm.weights.weight import param


@dataclass(frozen=True)
class Norm(Plug):
    """A normalisation layer; `eps` is added to what is divided by."""

    KEY: ClassVar[str] = "model.norm"

    eps: float = 1e-5

    def check(self, cfg: Model) -> None:
        """Raises `UserError` for a model that the norm does not fit."""

    def module(self, param_dtype: DTypeLike, name: str | None = None, axis: str = "embed") -> nn.Module:
        """A module that normalises the last axis of ``x[..., D]``, whose logical name is `axis`."""
        raise NotImplementedError


@dataclass(frozen=True)
class RMSNorm(Norm):
    """Root-mean-square norm (arXiv 1910.07467 eq. 4).

    `unit_offset`: the parameter is what the scale is more than 1 (Gemma, arXiv 2403.08295). It is kept so and added in
    float32: the sum in bfloat16, which has 8 bits, would lose most of a small one.
    """

    eps: float = 1e-5
    unit_offset: bool = later(False)

    def module(self, param_dtype: DTypeLike, name: str | None = None, axis: str = "embed") -> nn.Module:
        return _Norm(self.eps, False, param_dtype, axis, self.unit_offset, name=name)


@dataclass(frozen=True)
class LayerNorm(Norm):
    """Layer norm with scale and bias (arXiv 1607.06450)."""

    eps: float = 1e-5

    def module(self, param_dtype: DTypeLike, name: str | None = None, axis: str = "embed") -> nn.Module:
        return _Norm(self.eps, True, param_dtype, axis, False, name=name)


class _Norm(nn.Module):
    eps: float
    centre: bool
    param_dtype: Any
    axis: str
    unit_offset: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``x[..., D]``; same shape and dtype."""
        shape, of = (x.shape[-1],), self.param_dtype
        start = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = param(self, "scale", start, shape, of, axes=(self.axis,))
        bias = param(self, "bias", nn.initializers.zeros, shape, of, axes=(self.axis,)) if self.centre else None

        @jax.checkpoint  # the gradient keeps x alone: computing this again is cheaper than storing its steps
        def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
            y = x.astype(jnp.float32)
            if self.centre:
                y = y - y.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
            by = scale.astype(jnp.float32)
            y = y * (1.0 + by if self.unit_offset else by)
            if bias is not None:
                y = y + bias.astype(jnp.float32)
            return y.astype(x.dtype)

        return normalise(x, scale, bias)


TABLE = Table({"rmsnorm": RMSNorm, "layernorm": LayerNorm})
