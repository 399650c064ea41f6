"""Normalisation layers. Statistics are taken in float32 whatever the compute type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.plug import Table

AXES = {"scale": ("embed",), "bias": ("embed",)}


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm (arXiv 1910.07467 eq. 4)."""

    eps: float = 1e-5

    def module(self, param_dtype: Any, name: str | None = None) -> nn.Module:
        return _Norm(self.eps, centre=False, param_dtype=param_dtype, name=name)


@dataclass(frozen=True)
class LayerNorm:
    """Layer norm with scale and bias (arXiv 1607.06450)."""

    eps: float = 1e-5

    def module(self, param_dtype: Any, name: str | None = None) -> nn.Module:
        return _Norm(self.eps, centre=True, param_dtype=param_dtype, name=name)


class _Norm(nn.Module):
    eps: float
    centre: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``x[..., D]``; same shape and dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype) if self.centre else None

        @jax.checkpoint  # the gradient keeps x alone: computing this again is cheaper than storing its steps
        def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
            y = x.astype(jnp.float32)
            if self.centre:
                y = y - y.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
            y = y * scale.astype(jnp.float32)
            if bias is not None:
                y = y + bias.astype(jnp.float32)
            return y.astype(x.dtype)

        return normalise(x, scale, bias)


TABLE = Table({"rmsnorm": RMSNorm, "layernorm": LayerNorm})
