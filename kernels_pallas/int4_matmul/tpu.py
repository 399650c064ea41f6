"""Mosaic TPU kernel of the product with group-quantised weights.

A grid step holds all K inputs of `tile_n` outputs: the packed block arrives from HBM while the previous one is
multiplied, is dequantised once into a VMEM block of the activations' dtype, and serves every block of `tile_m` rows.
At decode (M <= tile_m) the weights are read once, packed: about 4.1 bits per weight at group 128 with bfloat16 scales,
which is the whole cost. K is limited by VMEM (`refusal`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas.common import AUTO, CHIPS, MIB, How, Index, Ref, Shaped, blocks, precision, vmem
from kernels_pallas.int4_matmul.reference import Quantized, shape

GROUPS = (32, 64, 128, 256)
STEP = 8  # groups dequantised by one turn of the loop
ROWS = 128  # rows of bytes unpacked at a time, unless a group has more


class Tiles(NamedTuple):
    """Rows and outputs of a grid step."""

    tile_m: int
    tile_n: int


def memory(K: int, tiles: Tiles, bits: int, group: int, dtype: DTypeLike, zeros: bool) -> int:
    """Bytes of VMEM of one grid step: two buffers of every block, and the dequantised block."""
    size = jnp.dtype(dtype).itemsize
    weights = K * tiles.tile_n * bits // 8 + (2 if zeros else 1) * (K // group) * tiles.tile_n * 4
    activations = tiles.tile_m * (K + tiles.tile_n) * size
    return 2 * (weights + activations) + K * tiles.tile_n * size


def given(how: How) -> Tiles | None:
    """The tiles of the caller, or None."""
    tile_m, tile_n = how.size("tile_m"), how.size("tile_n")
    return None if tile_m is None or tile_n is None else Tiles(tile_m, tile_n)


def choose_tiles(x_MK: Shaped, weights: Quantized, chip: str | None) -> Tiles | None:
    """The widest tiles within the chip's budget; None if not even the narrowest fit."""
    M, K = x_MK.shape
    N = weights.scales_GN.shape[1]
    bits, group = shape(weights, K)
    most = blocks("int4_matmul", chip if chip in CHIPS else None)
    rows = 8 if x_MK.dtype == jnp.float32 else 16
    for tile_n in (most["tile_n"], 256, 128):
        for tile_m in (most["tile_m"], 64, 16):
            tiles = Tiles(min(tile_m, -(-M // rows) * rows), min(tile_n, N))
            if memory(K, tiles, bits, group, x_MK.dtype, weights.zeros_GN is not None) <= most["mib"] * MIB:
                return tiles
    return None


def refusal(x_MK: Shaped, weights: Quantized, chip: str | None) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None."""
    _, group = shape(weights, x_MK.shape[1])
    if group not in GROUPS:
        return f"group {group}, the kernel has {', '.join(map(str, GROUPS))}"
    if choose_tiles(x_MK, weights, chip) is None:
        return f"K={x_MK.shape[1]} inputs do not fit the fast memory"
    return None


def _kernel(bits: int, half: int, x_ref: Ref, w_ref: Ref, s_ref: Ref, *rest: Ref) -> None:
    """x [P, tile_m, R], w [R, tile_n], s and z [R/half, tile_n] -> o [tile_m, tile_n]; whole [P, R, tile_n]."""
    *z_ref, o_ref, whole = rest
    groups = s_ref.shape[0]
    together = max(1, ROWS // half)  # groups unpacked at once

    def spread(values: jax.Array, first: int, count: int) -> jax.Array:
        """A row per group -> a row per byte."""
        rows = [jnp.broadcast_to(values[g : g + 1], (half, values.shape[1])) for g in range(first, first + count)]
        return jnp.concatenate(rows)

    def dequantize(group: Index, count: int) -> None:
        """The bytes of `count` groups from `group` on; offsets a multiple of 8, as Mosaic wants them."""
        scales = s_ref[pl.ds(group, count), :].astype(jnp.float32)
        zeros = None if not z_ref else z_ref[0][pl.ds(group, count), :].astype(jnp.float32)
        for first in range(0, count, together):
            some = min(together, count - first)
            start = pl.multiple_of(group * half, STEP * half)  # type: ignore[arg-type]  # it takes an int too
            rows = pl.ds(start + first * half, some * half)
            codes = w_ref[rows, :].astype(jnp.int32)
            scale = spread(scales, first, some)
            zero = (8.0 if bits == 4 else 0.0) if zeros is None else spread(zeros, first, some)
            for p, part in enumerate((codes & 15, (codes >> 4) & 15) if bits == 4 else (codes,)):
                whole[p, rows, :] = ((part.astype(jnp.float32) - zero) * scale).astype(whole.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        def body(i: jax.Array, carry: None) -> None:
            dequantize(pl.multiple_of(i * STEP, STEP), STEP)

        if groups >= STEP:
            jax.lax.fori_loop(0, groups // STEP, body, None)
        if groups % STEP:
            dequantize(groups - groups % STEP, groups % STEP)

    dot = functools.partial(jnp.dot, precision=precision(x_ref.dtype), preferred_element_type=jnp.float32)
    total = dot(x_ref[0], whole[0])
    if bits == 4:
        total += dot(x_ref[1], whole[1])
    o_ref[...] = total.astype(o_ref.dtype)


def int4_matmul(x_MK: jax.Array, weights: Quantized, how: How = AUTO) -> jax.Array:
    """``x @ w`` [M, N] in the dtype of `x`; sums in float32."""
    M, K = x_MK.shape
    R, N = weights.packed_RN.shape
    bits, group = shape(weights, K)
    P = 8 // bits
    half = group // P
    tile_m, tile_n = given(how) or choose_tiles(x_MK, weights, how.chip) or Tiles(16, 128)
    padded = max(M, tile_m)  # a few rows of decode become one whole tile
    x = jnp.pad(x_MK, ((0, padded - M), (0, 0)))
    x_PMR = x.reshape(padded, K // group, P, half).transpose(2, 0, 1, 3).reshape(P, padded, R)

    def per_group() -> pl.BlockSpec:
        return pl.BlockSpec((K // group, tile_n), lambda n, m: (0, n))

    arrays = [x_PMR, weights.packed_RN, weights.scales_GN]
    specs = [
        pl.BlockSpec((P, tile_m, R), lambda n, m: (0, m, 0)),
        pl.BlockSpec((R, tile_n), lambda n, m: (0, n)),
        per_group(),
    ]
    if weights.zeros_GN is not None:
        arrays.append(weights.zeros_GN)
        specs.append(per_group())
    out = pl.pallas_call(
        functools.partial(_kernel, bits, half),
        grid=(pl.cdiv(N, tile_n), pl.cdiv(padded, tile_m)),
        in_specs=specs,
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda n, m: (m, n)),
        out_shape=jax.ShapeDtypeStruct((padded, N), x.dtype),
        scratch_shapes=[pltpu.VMEM((P, R, tile_n), x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem(how.chip)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * padded * K * N, transcendentals=0, bytes_accessed=sum(a.nbytes for a in arrays) + 2 * padded * N
        ),
        interpret=how.interpret,
        name=f"int{bits}_matmul",
    )(*arrays)
    return out[:M]
