"""The linear layer every socket shares, and an initialiser."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.plug import Model
from lm.sharding.layout import parts
from lm.watch import Watch, tap
from lm.weights.weight import param, product


class Project(nn.Module):
    """``x[..., in] @ kernel[in, *out] (+ bias[*out])`` over the last `n_in` axes of x; `axes`: the kernel's logical
    names. What comes in can be watched as ``input``."""

    shape: tuple[int, ...]
    n_in: int
    use_bias: bool
    cfg: Model
    axes: tuple[str, ...]

    @nn.compact
    def __call__(self, x: jax.Array, watch: Watch = Watch()) -> jax.Array:  # noqa: B008  (frozen)
        cfg, split = self.cfg, self.n_in
        x = tap(self, watch, "input", x)
        init = nn.initializers.normal(cfg.init_std)
        kernel = param(self, "kernel", init, self.shape, cfg.param_dtype, axes=self.axes, n_in=split)
        rows, lead = x.shape[: x.ndim - split], self.shape[split:]
        flat = product(x.reshape(*row_axes(rows), math.prod(self.shape[:split])), kernel, split)
        y = flat.reshape(*rows, *lead)
        if self.use_bias:
            bias = param(self, "bias", nn.initializers.zeros, lead, cfg.param_dtype, axes=self.axes[split:])
            y = y + bias.astype(x.dtype)
        return y


def row_axes(rows: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of rows as a matrix product takes them: one, because the weights' gradient then sums over one axis, which
    the CPU does without a transposed copy. A layout that cuts tokens as well as rows keeps them apart: devices would
    have to gather the tokens to merge them."""
    return (-1,) if parts("length") == 1 else rows


def uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform in ``[-bound, bound]``, PyTorch's start of a linear layer where bound is 1 / sqrt(inputs)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
