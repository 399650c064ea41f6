"""Products of rows with the matrix of their group: what stacked experts compute.

On accelerators `jax.lax.ragged_dot`. XLA's CPU backend lowers that to one product per expert over *all* rows, E times
the work, so there it is a loop over experts, and within each over blocks of its rows. Letters: M rows, K and N widths,
E groups, b rows of a block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import unknown

IMPLEMENTATIONS = ("auto", "ragged", "blocks")


def grouped_dot(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, implementation: str = "auto") -> jax.Array:
    """``y[i] = x[i] @ w[e]`` for the ``sizes[0]`` first rows with e = 0, the next ``sizes[1]`` with e = 1, and so on.

    Rows beyond ``sum(sizes)`` give 0. `sizes` int32. Differentiable in x and w. `implementation`: ``ragged``,
    ``blocks``, or ``auto``: by the platform the program is lowered for. One group is the plain product.
    """
    if implementation not in IMPLEMENTATIONS:
        raise unknown("model.ffn.implementation", implementation, IMPLEMENTATIONS)
    if w_EKN.shape[0] == 1:
        inside = jnp.arange(x_MK.shape[0])[:, None] < sizes_E[0]
        return jnp.where(inside, x_MK @ w_EKN[0], jnp.zeros((), x_MK.dtype))
    return _dot(implementation, x_MK, w_EKN, sizes_E)


@jax.custom_batching.sequential_vmap  # the primitive's own batching rule does not cover stacked matrices
def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w, sizes)


def _dot_of(implementation: str, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    if implementation != "auto":
        return (_blocks if implementation == "blocks" else _ragged)(x, w, sizes)
    return jax.lax.platform_dependent(x, w, sizes, cpu=_blocks, default=_ragged)


@jax.custom_batching.sequential_vmap
def _outer_ragged(x: jax.Array, dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.vjp(lambda w: jax.lax.ragged_dot(x, w, sizes), w)[1](dy)[0]


def _outer_cpu(x: jax.Array, dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return _outer(x, dy, sizes).astype(w.dtype)


def _wrap() -> Any:
    dot = jax.custom_vjp(_dot_of, nondiff_argnums=(0,))

    def forward(implementation: str, x: Any, w: Any, sizes: Any) -> Any:
        return _dot_of(implementation, x, w, sizes), (x, w, sizes)

    def backward(implementation: str, saved: Any, dy: Any) -> Any:
        x, w, sizes = saved
        dx = _dot_of(implementation, dy, jnp.swapaxes(w, 1, 2), sizes)
        if implementation != "auto":
            outer = _outer_cpu if implementation == "blocks" else _outer_ragged
            return dx, outer(x, dy, w, sizes), None
        return dx, jax.lax.platform_dependent(x, dy, w, sizes, cpu=_outer_cpu, default=_outer_ragged), None

    dot.defvjp(forward, backward)
    return dot


_dot = _wrap()


def block(M: int, E: int) -> int:
    """Rows of a block: large enough that a matrix serves many rows, small enough that few of a group's last are
    idle."""
    return max(8, min(256, 1 << max(M // max(E, 1), 1).bit_length() - 1))


def _blocks(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    M, K = x_MK.shape
    b = block(M, w_EKN.shape[0])
    x = jnp.pad(x_MK, ((0, b), (0, 0)))
    first_E = jnp.cumsum(sizes_E) - sizes_E

    def expert(y: jax.Array, of: Any) -> tuple[jax.Array, None]:
        w, first, size = of

        def step(i: jax.Array, y: jax.Array) -> jax.Array:
            # What a group's last block writes beyond its rows, the next group writes again.
            at = first + i * b
            return jax.lax.dynamic_update_slice(y, jax.lax.dynamic_slice(x, (at, 0), (b, K)) @ w, (at, 0))

        return jax.lax.fori_loop(0, (size + b - 1) // b, step, y), None

    y = jnp.zeros((M + b, w_EKN.shape[2]), jnp.result_type(x_MK, w_EKN))
    y = jax.lax.scan(expert, y, (w_EKN, first_E, sizes_E))[0][:M]
    return jnp.where(jnp.arange(M)[:, None] < sizes_E.sum(), y, jnp.zeros((), y.dtype))


def _outer(x_MK: jax.Array, dy_MN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """``[E, K, N]``: the sum over each group's rows of ``x^T dy``, float32."""
    M, K, N = *x_MK.shape, dy_MN.shape[1]
    b = block(M, sizes_E.shape[0])
    x, dy = (jnp.pad(a, ((0, b), (0, 0))) for a in (x_MK, dy_MN))
    first_E = jnp.cumsum(sizes_E) - sizes_E

    def expert(_: None, of: Any) -> tuple[None, jax.Array]:
        first, size = of

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            at = first + i * b
            rows = jax.lax.dynamic_slice(x, (at, 0), (b, K))
            inside = jnp.arange(b)[:, None] < size - i * b
            rows = jnp.where(inside, rows, jnp.zeros((), x.dtype))
            own = jnp.where(inside, jax.lax.dynamic_slice(dy, (at, 0), (b, N)), jnp.zeros((), dy.dtype))
            return total + jnp.dot(rows.T, own, preferred_element_type=jnp.float32)

        return None, jax.lax.fori_loop(0, (size + b - 1) // b, step, jnp.zeros((K, N), jnp.float32))

    return jax.lax.scan(expert, None, (first_E, sizes_E))[1]
