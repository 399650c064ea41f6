"""How keys and values lie in a cache: such that a one-token step sums over neighbours in memory.

Keys ``[B, K, C, d]``, values ``[B, K, d, C]``: logits sum over d, outputs over C. XLA's CPU backend reads these six to
nine times faster than ``[B, C, K, d]``, which it transposes first. Everything else sees ``[B, C, K, d]``: a view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

KEYS = (0, 2, 1, 3)  # [B, T, K, d] -> [B, K, T, d], and back
VALUES = (0, 2, 3, 1)  # [B, T, K, d] -> [B, K, d, T]
_VALUES_BACK = (0, 3, 1, 2)


def keys_in(x: Any) -> Any:
    """``[B, T, K, d]`` (or a tree of such) as keys are kept."""
    return jax.tree.map(lambda leaf: leaf.transpose(KEYS), x)


def values_in(x: Any) -> Any:
    """``[B, T, K, d]`` (or a tree of such) as values are kept."""
    return jax.tree.map(lambda leaf: leaf.transpose(VALUES), x)


def keys_out(x: jax.Array) -> jax.Array:
    return x.transpose(KEYS)


def values_out(x: jax.Array) -> jax.Array:
    return x.transpose(_VALUES_BACK)


AXES = (2, 3, 1, 1)  # of the slots, in keys, values, index and positions


def put_rows(old: Any, new: Any, start_B: jax.Array, together: bool) -> Any:
    """``[B, …]`` of keys, values, index and positions (trees of them) with the new tokens of row b from slot
    ``start_B[b]`` on. `together`: all rows start in the same slot."""

    def one(o: jax.Array, n: jax.Array, axis: int) -> jax.Array:
        n = n.astype(o.dtype)
        if together:
            return jax.lax.dynamic_update_slice_in_dim(o, n, start_B[0], axis)

        def row(b: jax.Array, o: jax.Array) -> jax.Array:
            at = [jnp.int32(0)] * o.ndim
            at[0], at[axis] = b, start_B[b]
            return jax.lax.dynamic_update_slice(o, jax.lax.dynamic_slice_in_dim(n, b, 1, 0), at)

        def loop(o: jax.Array, n: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, o.shape[0], row, o)

        def every(o: jax.Array, n: jax.Array) -> jax.Array:
            mapped = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
            return jax.vmap(mapped)(o, n, start_B)

        # In place on a CPU; elsewhere as one scatter, whose rows stay where a layout has them.
        return jax.lax.platform_dependent(o, n, cpu=loop, default=every)

    return tuple(
        jax.tree.map(lambda o, n, axis=axis: one(o, n, axis), o, n) for o, n, axis in zip(old, new, AXES, strict=True)
    )


def write(put: Callable[[Any, Any], Any], old: Any, new: Any, used: jax.Array) -> Any:
    """``put(old, new)``, in the memory of `old` where it is donated. `used`: a number that is never below -1.

    XLA's CPU backend repeats an update for each of its readers (the next step, and the attention of this one), each on
    a copy of the whole cache. It does not look into a conditional, so the update is put into one that is always taken.
    """

    def opaque(old: Any, new: Any) -> Any:
        return jax.lax.cond(used >= -1, put, lambda old, new: old, old, new)

    return jax.lax.platform_dependent(old, new, cpu=opaque, default=put)
