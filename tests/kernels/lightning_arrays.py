"""What the tests of `lightning` call it with, on processors and GPUs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from kernel_checks import how

from kernels_pallas.lightning.api import lightning

DECAY = (1.0, 0.9, 1e-3)


def arrays_of(B: int, T: int, H: int, D: int, E: int, dtype: Any, seed: int = 0) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, T, H, D), (B, T, H, D), (B, T, H, E), (B, H, D, E))
    q, k, v, state = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), jnp.asarray((DECAY * H)[:H]), state


@functools.partial(jax.jit, static_argnames=("implementation", "chunk"))
def both_ways(arrays: tuple[Any, ...], implementation: str, chunk: int | None = None) -> Any:
    """Both results, and the gradients through both of them."""
    q, k, v, decay, state = arrays

    def loss(q: Any, k: Any, v: Any, state: Any) -> Any:
        o, last = lightning(q, k, v, decay, state, how(implementation, chunk=chunk))
        wave = jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)
        # Linear: the float32 truth sees the same cotangents.
        return jnp.sum(o.astype(jnp.float32) * wave) + jnp.sum(last * jnp.sin(1 + jnp.arange(last.shape[-1]))), (
            o,
            last,
        )

    gradients, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, state)
    return out, gradients
