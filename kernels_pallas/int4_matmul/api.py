"""Activations times int4 or int8 weights quantised in groups, as GPTQ (arXiv 2210.17323) and AWQ (2306.00978) store."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.common import AUTO, How, Shaped, check_how, kernel_forms, precision, run
from kernels_pallas.int4_matmul import gpu, reference, tpu
from kernels_pallas.int4_matmul.reference import Quantized
from lm.errors import UserError

NAME = "int4_matmul"


def _check(x: Shaped, weights: Quantized, how: How) -> None:
    packed, scales, zeros = weights
    K = x.shape[-1]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise UserError(f"{NAME}: x has dtype {x.dtype}; valid: bfloat16, float32")
    if packed.dtype != jnp.int8:
        raise UserError(f"{NAME}: packed weights have dtype {packed.dtype}; valid: int8")
    if packed.ndim != 2 or packed.shape[0] not in (K, K // 2):
        raise UserError(f"{NAME}: packed weights {packed.shape} do not go with K={K}; valid: ({K // 2}, N) or ({K}, N)")
    if scales.ndim != 2 or scales.shape[1] != packed.shape[1] or K % scales.shape[0]:
        raise UserError(
            f"{NAME}: scales {scales.shape} do not go with weights [{K}, {packed.shape[1]}]: a row per group"
        )
    if zeros is not None and zeros.shape != scales.shape:
        raise UserError(f"{NAME}: zeros {zeros.shape}; valid: the shape of the scales, {scales.shape}")
    bits, group = reference.shape(weights, K)
    if bits == 4 and group % 2:
        raise UserError(f"{NAME}: group {group}; valid: an even length, for two codes share a byte")
    if (how.size("tile_m") is None) != (how.size("tile_n") is None):
        raise UserError(f"{NAME}: sizes {dict(how.sizes)}; valid: both of tile_m and tile_n, or neither")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x_MK: jax.Array, weights: Quantized, K: int, how: How) -> jax.Array:
    refusals = tpu.refusal(x_MK, weights, how.chip), gpu.refusal(x_MK, weights, how)
    forms, reasons = kernel_forms(tpu.int4_matmul, gpu.int4_matmul, how, refusals)
    forms |= {"reference": reference.reference, "xla": reference.xla}
    return run(NAME, how, forms, reasons, x_MK, weights)


def _forward(x_MK: jax.Array, weights: Quantized, K: int, how: How) -> tuple[jax.Array, Quantized]:
    return _matmul(x_MK, weights, K, how), weights


def _backward(K: int, how: How, weights: Quantized, dy_MN: jax.Array) -> tuple[jax.Array, None]:
    w_KN = reference.dequantize(weights, K).astype(dy_MN.dtype)
    dx_MK = jnp.matmul(dy_MN, w_KN.T, precision=precision(dy_MN.dtype), preferred_element_type=jnp.float32)
    return dx_MK.astype(dy_MN.dtype), None


_matmul.defvjp(_forward, _backward)


def int4_matmul(x: jax.Array, weights: Quantized, how: How = AUTO) -> jax.Array:
    """``x @ w``: x [..., K] bfloat16 or float32, `weights` [K, N] -> [..., N] in the dtype of `x`.

    The weights are constants: the gradient goes to `x` alone, through XLA operations. `how` may give ``tile_m`` and
    ``tile_n``, rows and outputs of a tile; for a GPU also ``stages`` and ``ctas``.
    Raises UserError for shapes or dtypes that do not fit each other, and for an implementation that cannot serve.
    """
    check_how(NAME, how)
    _check(x, weights, how)
    K = x.shape[-1]
    y_MN = _matmul(x.reshape(-1, K), weights, K, how)
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])
