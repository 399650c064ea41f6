"""Weights that are more than one array, and the few ways in which the decoder reads a weight.

A parameter tree may hold, in the place of any matrix, an object with the methods of `Weight`: a matrix with a low-rank
term beside it, a quantised one. It is a pytree whose leaves lead with the same stacking axes as the array it replaces,
so slicing layers, scanning and sharding treat both alike. Plain arrays are read by the same functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import compat

# Logical axes of parameters that belong to another one (`lm.params.logical` adds the stacking axes of that one).
BELOW: dict[str, tuple[str, ...]] = {"lora_a": ("lora_in", "rank"), "lora_b": ("rank", "lora_out")}


@runtime_checkable
class Weight(Protocol):
    """`shape` is that of the array it stands for, without stacking axes once they are sliced off."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def product(self, x: jax.Array, n_in: int) -> jax.Array:
        """``x[..., in] -> [..., out]``: `x` times the weight, whose first `n_in` axes are summed over."""

    def transposed(self, x: jax.Array) -> jax.Array:
        """``x[..., D] -> [..., V]`` float32, for a weight ``[V, D]``."""

    def rows(self, ids: jax.Array) -> jax.Array:
        """``[*ids.shape, D]`` of a weight ``[V, D]``."""

    def dense(self) -> jax.Array:
        """The array it stands for; stacking axes allowed."""


def special(x: Any) -> bool:
    """Is this one of the objects above, rather than an array or a container?"""
    return not hasattr(x, "dtype") and isinstance(x, Weight)


def param(module: nn.Module, name: str, init: Callable[..., Any], *args: Any) -> Any:
    """``module.param``, which would refuse what is not an array of the declared shape."""
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if any(special(leaf) for leaf in jax.tree.leaves(value, is_leaf=special)):
            return value
    return module.param(name, init, *args)


def product(x: jax.Array, weight: Any, n_in: int, dtype: Any = None) -> jax.Array:
    """``x[..., in] @ weight[*in, *out] -> [..., out]``, of type `dtype` (None = that of `x`)."""
    if special(weight):
        return weight.product(x, n_in).astype(x.dtype if dtype is None else dtype)
    matrix = weight.astype(x.dtype).reshape(x.shape[-1], math.prod(weight.shape[n_in:]))
    return jnp.matmul(x, matrix, preferred_element_type=dtype)


def transposed(x: jax.Array, weight: Any) -> jax.Array:
    """``x[..., D] @ weight[V, D].T -> [..., V]`` float32."""
    if special(weight):
        return weight.transposed(x)
    return jnp.einsum("...d,vd->...v", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def rows(weight: Any, ids: jax.Array) -> jax.Array:
    """Rows ``[*ids.shape, D]`` of ``weight[V, D]``."""
    return weight.rows(ids) if special(weight) else weight[ids]


def dense(weight: Any) -> jax.Array:
    """The array that `weight` is or stands for."""
    return weight.dense() if special(weight) else weight


def densify(tree: Any) -> Any:
    """`tree` with arrays everywhere."""
    return jax.tree.map(dense, tree, is_leaf=special)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """``w + scale a b``, never formed: `w` any weight, `a` ``[in, r]``, `b` ``[r, out]`` (arXiv 2106.09685, eq. 3).

    With `key` (a jax.random key per stacked tensor), the input of `a` is dropped out at `rate`.
    """

    w: Any
    a: jax.Array
    b: jax.Array
    key: Any = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
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
