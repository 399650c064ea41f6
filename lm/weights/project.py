"""The linear layer every socket shares, and an initialiser."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import weights
from lm.config import ModelConfig
from lm.sharding import parts


class Project(nn.Module):
    """``x[..., in] @ kernel[in, *out] (+ bias[*out])`` over the last `n_in` axes of x."""

    shape: tuple[int, ...]
    n_in: int
    use_bias: bool
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, split = self.cfg, self.n_in
        init = nn.initializers.normal(cfg.init_std)
        kernel = weights.param(self, "kernel", init, self.shape, cfg.param_dtype)
        rows, lead = x.shape[: x.ndim - split], self.shape[split:]
        flat = weights.product(x.reshape(*row_axes(rows), math.prod(self.shape[:split])), kernel, split)
        y = flat.reshape(*rows, *lead)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, lead, cfg.param_dtype).astype(x.dtype)
        return y


def row_axes(rows: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of rows as a matrix product takes them: one, because the weights' gradient then sums over one axis, which
    the CPU does without a transposed copy. A layout that cuts tokens as well as rows keeps them apart: devices would
    have to gather the tokens to merge them."""
    return (-1,) if parts("length") == 1 else rows


def uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform in ``[-bound, bound]``, PyTorch's start of a linear layer where bound is 1 / sqrt(inputs)."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
