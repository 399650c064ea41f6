"""A matrix in int8 with a scale per output."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm import compat
from lm.weights.weight import Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(Weight):
    """``w ~ scale q``: int8 in -127 … 127, and float32 scales, one for every output (a row of `q`).

    `q` is ``[out, in]`` however the array is laid out, because XLA's CPU backend then reads it as int8, at the full
    bandwidth of memory, and converts in registers; ``[in, out]`` it would convert first. `table`: the array is
    ``[V, D]``, read by rows, its outputs are V; else its first axes are the inputs.
    """

    q: jax.Array
    scale: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    table: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, array: jax.Array, stacked: int, n_in: int, table: bool = False) -> Int8:
        """`array` with `stacked` stacking axes in front, rounded to nearest; the largest of an output becomes 127."""
        lead, shape = array.shape[:stacked], array.shape[stacked:]
        flat = array.astype(jnp.float32).reshape(*lead, math.prod(shape[:n_in]), -1)
        flat = flat if table else jnp.swapaxes(flat, -1, -2)
        scale = jnp.abs(flat).max(-1) / 127.0
        q = jnp.round(flat / jnp.where(scale == 0, 1.0, scale)[..., None]).astype(jnp.int8)
        return cls(q, scale, tuple(shape), table)

    def _read(self, x: jax.Array) -> jax.Array:
        y = compat.times_int8(x.reshape(-1, x.shape[-1]), self.q) * self.scale
        return y.reshape(*x.shape[:-1], -1)

    def product(self, x: jax.Array, n_in: int) -> jax.Array:
        return self._read(x).astype(x.dtype)

    def transposed(self, x: jax.Array) -> jax.Array:
        return self._read(x)

    def rows(self, ids: jax.Array) -> jax.Array:
        return self.q[ids].astype(jnp.float32) * self.scale[ids][..., None]

    def dense(self) -> jax.Array:
        flat = self.q.astype(jnp.float32) * self.scale[..., None]
        flat = flat if self.table else jnp.swapaxes(flat, -1, -2)
        return flat.reshape(*flat.shape[:-2], *self.shape)
