"""Group-quantised weights: their form, how to make them, and the product in plain jnp.

Letters: M rows of activations, K inputs, N outputs, g group length along K, P codes per byte (2 of 4 bits, 1 of 8).

``w[k, n] = (code[k, n] - zero[k // g, n]) * scale[k // g, n]``. Codes of 4 bits are 0..15 and the zero point is 8 where
none is given; codes of 8 bits are -128..127, zero point 0. Zero points may be fractions.

Packing of 4 bits: within a group, byte ``i`` holds code ``i`` in its low half and code ``i + g/2`` in its high half.
So both halves of a row of bytes share one scale, and a kernel unpacks without moving a value across rows. Weights split
by outputs, or by inputs at a group's boundary, need no repacking.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
    """A weight matrix [K, N]; a pytree. Bits and group follow from the shapes and K."""

    packed_RN: jax.Array  # int8; R = K / 2 rows of 4-bit pairs, or K rows of 8-bit codes
    scales_GN: jax.Array  # float; G = K / g
    zeros_GN: jax.Array | None = None  # float, in units of a code


def pack(codes_KN: jax.Array, group: int) -> jax.Array:
    """Codes 0..15 [K, N] -> int8 [K/2, N]."""
    K, N = codes_KN.shape
    parts = codes_KN.astype(jnp.int32).reshape(K // group, 2, group // 2, N)
    pairs = (parts[:, 0] | (parts[:, 1] << 4)).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(pairs, jnp.int8).reshape(K // 2, N)


def unpack(packed_RN: jax.Array, group: int) -> jax.Array:
    """int8 [K/2, N] -> codes 0..15 as int32 [K, N]."""
    R, N = packed_RN.shape
    pairs = packed_RN.astype(jnp.int32).reshape(2 * R // group, 1, group // 2, N)
    return jnp.concatenate([pairs & 15, (pairs >> 4) & 15], axis=1).reshape(2 * R, N)


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric"))
def quantize(w_KN: jax.Array, bits: int = 4, group: int = 128, symmetric: bool = True) -> Quantized:
    """Round to nearest. Symmetric: codes spread over the largest magnitude of a group; else over its range."""
    K, N = w_KN.shape
    w = w_KN.astype(jnp.float32).reshape(K // group, group, N)
    low, high = (0, 15) if bits == 4 else (-128, 127)
    if symmetric:
        zero = jnp.float32(8 if bits == 4 else 0)
        scale = jnp.max(jnp.abs(w), axis=1, keepdims=True) / (high - zero)
    else:
        least, most = jnp.min(w, axis=1, keepdims=True), jnp.max(w, axis=1, keepdims=True)
        scale = (most - least) / (high - low)
    scale = jnp.where(scale > 0, scale, 1.0)
    if not symmetric:
        zero = low - least / scale
    codes = jnp.clip(jnp.round(w / scale + zero), low, high).astype(jnp.int32).reshape(K, N)
    packed = pack(codes, group) if bits == 4 else codes.astype(jnp.int8)
    return Quantized(packed, scale[:, 0], None if symmetric else zero[:, 0])


def shape(weights: Quantized, inputs: int) -> tuple[int, int]:
    """(bits, group) of weights with `inputs` rows."""
    return (8 if weights.packed_RN.shape[0] == inputs else 4), inputs // weights.scales_GN.shape[0]


def dequantize(weights: Quantized, inputs: int) -> jax.Array:
    """float32 [K, N]."""
    bits, group = shape(weights, inputs)
    codes = unpack(weights.packed_RN, group) if bits == 4 else weights.packed_RN.astype(jnp.int32)
    w = codes.astype(jnp.float32).reshape(inputs // group, group, -1)
    zeros = jnp.float32(8 if bits == 4 else 0)
    if weights.zeros_GN is not None:
        zeros = weights.zeros_GN.astype(jnp.float32)[:, None]
    return ((w - zeros) * weights.scales_GN.astype(jnp.float32)[:, None]).reshape(inputs, -1)


def reference(x_MK: jax.Array, weights: Quantized) -> jax.Array:
    """``x @ w`` [M, N] with every product in float32, in the dtype of `x`."""
    w_KN = dequantize(weights, x_MK.shape[-1])
    return jnp.matmul(x_MK.astype(jnp.float32), w_KN, precision=jax.lax.Precision.HIGHEST).astype(x_MK.dtype)


def xla(x_MK: jax.Array, weights: Quantized) -> jax.Array:
    """The form for every platform: weights rounded to the dtype of `x`, one product with float32 sums."""
    w_KN = dequantize(weights, x_MK.shape[-1]).astype(x_MK.dtype)
    precision = jax.lax.Precision.HIGHEST if x_MK.dtype == jnp.float32 else None
    return jnp.matmul(x_MK, w_KN, precision=precision, preferred_element_type=jnp.float32).astype(x_MK.dtype)
