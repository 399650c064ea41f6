"""A matrix with a low-rank term beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lm.weights.weight import AnyWeight, Weight, dense, product, rows, transposed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Weight):
    """``w + scale a b``, never formed: `w` any weight, `a` ``[in, r]``, `b` ``[r, out]`` (arXiv 2106.09685, eq. 3).

    With `key` (a jax.random key per stacked tensor), the input of `a` is dropped out at `rate`.
    """

    w: AnyWeight
    a: jax.Array
    b: jax.Array
    key: Any = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.w.shape)

    def _term(self, x: jax.Array) -> jax.Array:
        return self.scale * ((x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype))

    def product(self, x: jax.Array, n_in: int) -> jax.Array:
        dropped = x
        if self.key is not None and self.rate:
            kept = jax.random.bernoulli(self.key, 1.0 - self.rate, x.shape)
            dropped = jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)
        return product(x, self.w, n_in) + self._term(dropped)

    def transposed(self, x: jax.Array) -> jax.Array:
        term = self.scale * ((x @ self.b.T.astype(x.dtype)) @ self.a.T.astype(x.dtype))
        return transposed(x, self.w) + term.astype(jnp.float32)

    def rows(self, ids: jax.Array) -> jax.Array:
        base = rows(self.w, ids)
        return base + (self.scale * (self.a[ids] @ self.b)).astype(base.dtype)

    def dense(self) -> jax.Array:
        base = dense(self.w)
        term = self.scale * (self.a.astype(jnp.float32) @ self.b.astype(jnp.float32))
        return (base.astype(jnp.float32) + term.reshape(base.shape)).astype(base.dtype)
