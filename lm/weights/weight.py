"""Weights that are more than one array, and the few ways in which the decoder reads a weight.

A parameter tree may hold, in the place of any matrix, an object with the methods of `Weight`: a matrix with a low-rank
term beside it, a quantised one. It is a pytree whose leaves lead with the same stacking axes as the array it replaces,
so slicing layers, scanning and sharding treat both alike. Plain arrays are read by the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

# Logical axes of parameters that belong to another one (`lm.model.params.logical` adds the stacking axes of that one).
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
