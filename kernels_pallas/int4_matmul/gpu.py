"""Mosaic GPU kernel (Hopper) of the product with group-quantised weights.

It computes ``y.T = w.T @ x.T``: the matrix unit wants 64 rows of one operand, and a batch has less while a weight
matrix has more. So 64 outputs are rows, held in registers, and 8 to 128 rows of `x` are columns, in shared memory.
Codes stay whole numbers, which bfloat16 holds exactly; a group's sum is scaled once it is summed, in float32:
``y += scale * (codes @ x - (zero - 8) * sum(x))``, sum(x) a product with ones. No weight is rounded.

A block of threads takes `tile_n` outputs (64 for each compute warpgroup), `tile_m` rows and a share of the inputs.
`splits` blocks share what would be one, so that a small matrix fills the chip; XLA adds their sums. One more warpgroup
copies `stages` steps of 32 to 256 inputs ahead (TMA). At M <= 8 a step of 128 is 8 KiB of packed weights, 2 KiB of `x`
and 256 bytes of scales, and 4 stages take 41 KiB; at M = 128 they take 161 KiB. Registers: 64 by `tile_m` sums twice (8
a thread at M = 8, 128 at M = 128), 32 for the operand. At decode the packed weights are read once, which is the cost; a
byte is two weights and takes about 6 instructions (load, widen, shuffle, and, or, subtract). Every 128 rows read them
again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from kernels_pallas import hopper
from kernels_pallas.common import AUTO, GPUS, How, Ref, Shaped
from kernels_pallas.int4_matmul.reference import Quantized, shape
from kernels_pallas.int4_matmul.tpu import given

GROUPS = (32, 64, 128, 256)
ROWS = (8, 16, 32, 64, 128)
STEP = 128  # inputs of a step, unless a group has more
WIDE = 64  # rows from which the compute warpgroups take registers from the one that copies


class Plan(NamedTuple):
    """How a call is cut: `step` inputs at a time, `turns` steps for each of `splits` blocks."""

    tile_m: int
    tile_n: int
    step: int
    turns: int
    splits: int
    stages: int


def plan(x_MK: Shaped, weights: Quantized, how: How = AUTO) -> Plan:
    """The plan of a call that is not refused."""
    size = how.blocks("int4_matmul", "h100")
    M, K = x_MK.shape
    N = weights.scales_GN.shape[1]
    _, group = shape(weights, K)
    tile_n = size["tile_n"] if N % size["tile_n"] == 0 else 64
    most = min(size["tile_m"], 64) if weights.zeros_GN is not None else size["tile_m"]
    tile_m = next(m for m in ROWS if m >= min(M, most))
    groups = K // group
    together = next(n for n in (STEP // group, 2, 1) if n and n * group <= max(STEP, group) and groups % n == 0)
    steps = groups // together
    tiles = N // tile_n * -(-M // tile_m)
    count = -(-steps // min(steps, max(1, -(-size["ctas"] // tiles))))
    return Plan(tile_m, tile_n, together * group, count, -(-steps // count), min(size["stages"], max(2, count)))


def memory(p: Plan, bits: int, group: int, scale: DTypeLike, zeros: bool) -> int:
    """Bytes of shared memory of a block."""
    per_group = p.step // group * p.tile_n * jnp.dtype(scale).itemsize
    return p.stages * (p.step * bits // 8 * p.tile_n + 2 * p.step * p.tile_m + (2 if zeros else 1) * per_group)


def refusal(x_MK: Shaped, weights: Quantized, how: How = AUTO) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None."""
    tiles = given(how)
    K, N = x_MK.shape[1], weights.scales_GN.shape[1]
    bits, group = shape(weights, K)
    kinds = {str(a.dtype) for a in weights[1:] if a is not None}
    reasons = {
        f"x has dtype {x_MK.dtype}, the kernel takes bfloat16": x_MK.dtype != jnp.bfloat16,
        f"scales and zeros of dtype {' and '.join(sorted(kinds))}, the kernel takes one, bfloat16 or float32": (
            len(kinds) > 1 or not kinds <= {"bfloat16", "float32"}
        ),
        f"group {group}, the kernel has {', '.join(map(str, GROUPS))}": group not in GROUPS,
        f"N={N} outputs, the kernel takes multiples of 64": N % 64 != 0,
        f"tiles {tiles}, the kernel has tile_m {', '.join(map(str, ROWS))} and tile_n 64, 128": (
            tiles is not None and (tiles.tile_m not in ROWS or tiles.tile_n not in (64, 128))
        ),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        return reason
    needed = memory(plan(x_MK, weights, how), bits, group, weights.scales_GN.dtype, weights.zeros_GN is not None)
    return None if needed <= GPUS["h100"].smem else f"{needed} bytes of shared memory, a block has {GPUS['h100'].smem}"


def _codes(o: hopper.Ops, ref: Ref, bits: int) -> list[jax.Array]:
    """Packed bytes [rows, 64] -> ``code - 8`` (4 bits, two tiles) or the code (8 bits), bfloat16 [64, rows], exact."""
    bytes_ = o.load_transposed(ref)
    if bits == 8:
        return [o.tile(bytes_.astype(jnp.bfloat16))]
    # Integers become floats by writing them into the mantissa: 0x4300 | n is 128 + n as bfloat16, for n below 128. The
    # high half stays where it is, as 16 times itself, its top bit aside: 0x4100 | 128 is 16, 0x4100 is 8.
    word = functools.partial(jnp.asarray, dtype=jnp.int16)
    pairs = o.tile(bytes_.astype(jnp.int16))

    def floats(bits16: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(bits16, jnp.bfloat16)

    low = floats((pairs & word(0x0F)) | word(0x4300)) - jnp.bfloat16(136)
    high = floats((pairs & word(0x70)) | word(0x4300)) * jnp.bfloat16(1 / 16)
    return [low, high - floats(((pairs & word(0x80)) ^ word(0x80)) | word(0x4100))]


@dataclass(frozen=True)
class Launch:
    """What is static in the kernel: `bits` of a code, inputs of a `group`, `steps` over all inputs."""

    ops: hopper.Ops
    plan: Plan
    bits: int
    group: int
    steps: int


def _kernel(launch: Launch, *refs: Ref) -> None:
    """x [M, K], packed [R, N], scales and perhaps zeros [G, N] -> out [splits, N, M]; then buffers, barriers."""
    o, p, bits, group, steps = launch.ops, launch.plan, launch.bits, launch.group, launch.steps
    sources, out_ref, buffers, ready, free = refs[: (n := len(refs) // 2 - 1)], refs[n], refs[n + 1 : -2], *refs[-2:]
    has_zeros = len(sources) == 4
    tile, split, rows = lax.axis_index("n"), lax.axis_index("split"), lax.axis_index("m")
    thread, warpgroups = lax.axis_index("wg"), p.tile_n // 64
    first = split * p.turns
    count = jnp.minimum(steps - first, p.turns)
    half = group * bits // 8  # rows of bytes of a group
    groups = p.step // group

    def slot(i: jax.Array) -> jax.Array:
        return lax.rem(i, jnp.int32(p.stages))

    @pl.when(thread < warpgroups)
    def _() -> None:
        if p.tile_m >= WIDE:
            plgpu.set_max_registers(232, action="increase")
        x, packed, scales, *zeros = buffers
        mine = pl.ds(thread * 64, 64)
        ones = o.tile(jnp.ones((64, half), jnp.bfloat16)) if has_zeros else None

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            at = slot(i)
            hopper.wait(ready.at[at])

            def per_output(ref: Ref, g: int) -> jax.Array:
                values = o.per_row(ref[at, g, mine]).astype(jnp.float32)
                return lax.broadcast_in_dim(values, total.shape, [0])

            for g in range(groups):
                codes = _codes(o, packed.at[at, pl.ds(g * half, half), mine], bits)
                columns = [x.at[at, :, pl.ds(g * group + part * half, half)] for part in range(len(codes))]
                found = o.dots(list(zip(codes, columns, strict=True)), transpose_b=True)
                if ones is not None:
                    zero = per_output(zeros[0], g) - (8.0 if bits == 4 else 0.0)
                    found = found - zero * o.dots([(ones, c) for c in columns], transpose_b=True)
                total = total + found * per_output(scales, g)
            plgpu.commit_smem()  # plain reads are over before a copy writes there
            hopper.arrive(free.at[at])
            return total

        total = lax.fori_loop(0, count, step, o.tile(jnp.zeros((64, p.tile_m), jnp.float32)))
        where = (split, pl.ds(tile * p.tile_n + thread * 64, 64), pl.ds(rows * p.tile_m, p.tile_m))
        out_ref[where] = total  # float32: its stores are whole sectors of 32 bytes, those of bfloat16 are halves

    @pl.when(thread == warpgroups)
    def _() -> None:
        if p.tile_m >= WIDE:
            plgpu.set_max_registers(40, action="decrease")
        outputs = pl.ds(tile * p.tile_n, p.tile_n)

        def fetch(i: jax.Array) -> None:
            at, k = slot(i), first + i
            per_group = (pl.ds(k * groups, groups), outputs)
            places = [
                (pl.ds(rows * p.tile_m, p.tile_m), pl.ds(k * p.step, p.step)),
                (pl.ds(k * groups * half, groups * half), outputs),
                *[per_group] * (len(sources) - 2),
            ]
            for source, place, buffer in zip(sources, places, buffers, strict=True):
                hopper.copy_in(source.at[place], buffer.at[at], ready.at[at])

        for i in range(p.stages):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))

        @pl.loop(p.stages, jnp.maximum(count, p.stages))
        def _(i: jax.Array) -> None:
            hopper.wait(free.at[slot(i)])
            fetch(i)

        @pl.loop(jnp.maximum(count - p.stages, 0), count)  # the interpreter wants every arrival seen
        def _(i: jax.Array) -> None:
            hopper.wait(free.at[slot(i)])


def int4_matmul(x_MK: jax.Array, weights: Quantized, how: How = AUTO) -> jax.Array:
    """``x @ w`` [M, N] in the dtype of `x`; sums in float32."""
    M, K = x_MK.shape
    N = weights.scales_GN.shape[1]
    bits, group = shape(weights, K)
    p = plan(x_MK, weights, how)
    padded = -(-M // p.tile_m) * p.tile_m
    arrays = [jnp.pad(x_MK, ((0, padded - M), (0, 0))), *(a for a in weights if a is not None)]
    half, groups = group * bits // 8, p.step // group
    per_group = plgpu.SMEM((p.stages, groups, p.tile_n), weights.scales_GN.dtype)
    out = plgpu.kernel(
        functools.partial(_kernel, Launch(hopper.Ops(bool(how.interpret)), p, bits, group, K // p.step)),
        out_type=jax.ShapeDtypeStruct((p.splits, N, padded), jnp.float32),
        grid=(p.splits, N // p.tile_n, padded // p.tile_m),
        grid_names=("split", "n", "m"),
        num_threads=p.tile_n // 64 + 1,
        thread_name="wg",
        scratch_types=[
            hopper.smem((p.stages, p.tile_m, p.step), x_MK.dtype, min(hopper.SWIZZLE, 2 * half)),
            hopper.smem((p.stages, groups * half, p.tile_n), jnp.int8, 64),
            *[per_group] * (len(arrays) - 2),
            plgpu.Barrier(num_arrivals=len(arrays), num_barriers=p.stages),
            plgpu.Barrier(num_arrivals=p.tile_n // 64, num_barriers=p.stages),
        ],
        interpret=hopper.params(bool(how.interpret)),
    )(*arrays)
    return jnp.sum(out, axis=0).T[:M].astype(x_MK.dtype)
