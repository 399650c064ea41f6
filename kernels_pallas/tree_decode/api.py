"""Attention of a tree of draft tokens against a long cache, for speculative decoding (SpecInfer, arXiv 2305.09781)."""

from __future__ import annotations

import functools
from typing import Any

import jax

from kernels_pallas.common import AUTO, How, check_how, kernel_forms, run
from kernels_pallas.tree_decode import gpu, reference, tpu
from kernels_pallas.tree_decode.problem import NAME, Filled, Problem
from lm.errors import UserError


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(how: How, q: jax.Array, k: jax.Array, v: jax.Array, problem: Filled) -> tuple[jax.Array, jax.Array]:
    forms, refusals = kernel_forms(tpu.tree_decode, gpu.tree_decode, how, (tpu.refusal(q, k), gpu.refusal(q, k, how)))
    forms |= {"reference": reference.reference, "xla": reference.xla}
    return run(NAME, how, forms, refusals, q, k, v, problem)


@_attend.defjvp
def _refuse(how: How, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    raise UserError(f"{NAME}: it has no gradient; valid: inference, or jax.lax.stop_gradient around its inputs")


def tree_decode(
    q: jax.Array, k: jax.Array, v: jax.Array, problem: Problem, how: How = AUTO
) -> tuple[jax.Array, jax.Array]:
    """Every node attends to its row's cache and to its ancestors -> output [B, N, H, d], log-sum-exp f32 [B, N, H].

    q [B, N, H, d]: 1 to 256 nodes, rotated. k, v [B, K, S, d]: the cache. A node that sees nothing has output 0 and
    log-sum-exp -inf. `how` may give ``tile_s``, the slots per grid step; for a GPU also ``stages`` and ``ctas``.
    Raises UserError for shapes or dtypes that do not fit each other, for an implementation that cannot serve, and when
    differentiated.
    """
    check_how(NAME, how)
    filled = problem.filled(q, k, v)
    tile_s = how.size("tile_s")
    if tile_s is not None and (tile_s < 128 or tile_s % 128):
        raise UserError(f"{NAME}: tile_s {tile_s}; valid: a multiple of 128")
    return _attend(how, q, k, v, filled)
