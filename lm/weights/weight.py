"""Weights that are more than one array, and the few ways in which the decoder reads a weight.

A parameter tree may hold, in the place of any matrix, an object with the methods of `Weight`: a matrix with a low-rank
term beside it, a quantised one. It is a pytree whose leaves lead with the same stacking axes as the array it replaces,
so slicing layers, scanning and sharding treat both alike. Plain arrays are read by the same functions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jax.typing import DTypeLike

# Logical axes of parameters that belong to another one (`lm.model.params.Axes` adds its stacking axes).
BELOW: dict[str, tuple[str, ...]] = {"lora_a": ("lora_in", "rank"), "lora_b": ("rank", "lora_out")}


class Weight:
    """A matrix that is more than one array: a frozen dataclass that is a pytree. `shape` is that of the array it stands
    for, without stacking axes once they are sliced off."""

    shape: tuple[int, ...]

    def product(self, x: jax.Array, n_in: int) -> jax.Array:
        """``x[..., in] -> [..., out]``: `x` times the weight, whose first `n_in` axes are summed over."""
        raise NotImplementedError

    def transposed(self, x: jax.Array) -> jax.Array:
        """``x[..., D] -> [..., V]`` float32, for a weight ``[V, D]``."""
        raise NotImplementedError

    def rows(self, ids: jax.Array) -> jax.Array:
        """``[*ids.shape, D]`` of a weight ``[V, D]``."""
        raise NotImplementedError

    def dense(self) -> jax.Array:
        """The array it stands for; stacking axes allowed."""
        raise NotImplementedError


AnyWeight = jax.Array | Weight


def special(x: object) -> bool:
    """Is this one of the objects above, rather than an array or a container?"""
    return isinstance(x, Weight)


@dataclass(frozen=True)
class Declared:
    """What is known of a parameter where it is declared: the logical `axes` of its array, and of a linear layer's
    weight `n_in`, how many axes are summed over (0 = it is read in another way)."""

    axes: tuple[str, ...]
    n_in: int = 0


_NOTES: ContextVar[dict[str, Declared] | None] = ContextVar("notes", default=None)
_INSIDE: ContextVar[tuple[str, tuple[str, ...]]] = ContextVar("inside", default=("", ()))


@contextlib.contextmanager
def noting() -> Iterator[dict[str, Declared]]:
    """While a model's parameters are traced in it, their declarations are collected by name."""
    notes: dict[str, Declared] = {}
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


@contextlib.contextmanager
def inside(prefix: str, stacked: tuple[str, ...] = ()) -> Iterator[None]:
    """Parameters declared in it lie below `prefix`, in arrays that lead with the axes `stacked`."""
    token = _INSIDE.set((prefix, stacked))
    try:
        yield
    finally:
        _INSIDE.reset(token)


def param(
    module: nn.Module,
    name: str,
    init: Callable[..., Any],
    shape: tuple[int, ...] | None = None,
    dtype: DTypeLike | None = None,
    *,
    axes: tuple[str, ...] = (),
    n_in: int = 0,
) -> Any:
    """A parameter of `module`: an array of `shape`, or a `Weight` in its place. `axes` are the logical names of its
    axes (`lm.sharding`), none for a tree of parameters that are declared on their own; `n_in` as in `Declared`."""
    notes = _NOTES.get()
    if notes is not None and axes:
        prefix, stacked = _INSIDE.get()
        notes["/".join((*filter(None, (prefix,)), *module.path, name))] = Declared((*stacked, *axes), n_in)
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if shape is not None and not special(value) and value.shape != shape:
            raise ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
        return value  # without `module.param`, which would trace `init` for its shape at every application
    return module.param(name, init) if shape is None else module.param(name, init, shape, dtype)


def product(x: jax.Array, weight: AnyWeight, n_in: int, dtype: DTypeLike | None = None) -> jax.Array:
    """``x[..., in] @ weight[*in, *out] -> [..., out]``, of type `dtype` (None = that of `x`)."""
    if isinstance(weight, Weight):
        return weight.product(x, n_in).astype(x.dtype if dtype is None else dtype)
    matrix = weight.astype(x.dtype).reshape(x.shape[-1], math.prod(weight.shape[n_in:]))
    return jnp.matmul(x, matrix, preferred_element_type=dtype)


def transposed(x: jax.Array, weight: AnyWeight) -> jax.Array:
    """``x[..., D] @ weight[V, D].T -> [..., V]`` float32."""
    if isinstance(weight, Weight):
        return weight.transposed(x)
    return jnp.einsum("...d,vd->...v", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def rows(weight: AnyWeight, ids: jax.Array) -> jax.Array:
    """Rows ``[*ids.shape, D]`` of ``weight[V, D]``."""
    return weight.rows(ids) if isinstance(weight, Weight) else weight[ids]


def dense(weight: AnyWeight) -> jax.Array:
    """The array that `weight` is or stands for."""
    return weight.dense() if isinstance(weight, Weight) else weight
