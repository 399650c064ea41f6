"""Mosaic GPU kernel (Hopper) of linear attention in chunks, in both directions.

A block of one warpgroup per (row, head, 64 columns of the values) goes through the chunks of 64 tokens in order. The
state [D, 64] stays in registers in float32 from chunk to chunk, as the accumulator of the matrix unit, and so do the
powers of the decay [64, 64]. A chunk is four products: q k^T, that times v, q times the state (which passes through
shared memory in bfloat16), and k^T times the decayed v. Queries, keys and values are read by TMA where they lie, heads
behind tokens, `stages` chunks ahead; outputs are written the same way while the next chunk is computed.

Registers of a thread, D 128: state 64, powers 32, a product 32, outputs 32, beside addresses and what is in flight.
Shared memory of a block (`memory`), D 128 and 2 stages: 104 KiB, so that two blocks share a multiprocessor and one
computes while the other waits. Work of a chunk: 128 * 64 * (D + 64) + 256 * 64 * D operations; q k^T is computed again
for each 64 columns of the values. One row of 32 heads, E 128, is 64 blocks: half of an H100.

The backward pass is three such scans (api.py). The equations are in reference.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.common import AUTO, GPUS, How, Ref, Shaped
from kernels_pallas.lightning.problem import Problem

CHUNK = 64  # tokens: the rows the matrix unit multiplies for a warpgroup
WIDTH = 64  # columns of the values of a block: 128 bytes, a row of a tile
STATE = 128  # rows of the state that fit the registers


def memory(D: int, stages: int) -> int:
    """Bytes of shared memory of a block: chunks ahead, the state, and decayed values that give way to outputs."""
    D = D + -D % WIDTH
    return 2 * (stages * CHUNK * (2 * D + WIDTH) + D * WIDTH + CHUNK * WIDTH) + 8 * stages


def _ahead(how: How) -> int:
    return how.blocks("lightning", how.hopper)["stages"]


def refusal(q_BHTD: Shaped, how: How) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None. Values may have any width."""
    chunk = how.size("chunk")
    if q_BHTD.dtype != jnp.bfloat16:
        return f"{q_BHTD.dtype}, the matrix unit multiplies bfloat16"
    if q_BHTD.shape[-1] > STATE:
        return f"queries of width {q_BHTD.shape[-1]}, the registers hold a state of {STATE} rows"
    if chunk not in (None, CHUNK):
        return f"chunks of {chunk} tokens, the kernel takes {CHUNK}"
    need, limit = memory(q_BHTD.shape[-1], _ahead(how)), GPUS[how.hopper].smem
    if need > limit - 1024:  # what alignment takes
        return f"{need} bytes of shared memory, a block has {limit}"
    return None


@dataclass(frozen=True)
class Launch:
    """What is static in the kernel: `length` of the text in `steps` chunks, `stages` of copies."""

    ops: hopper.Ops
    length: int
    steps: int
    stages: int
    reverse: bool


def _kernel(launch: Launch, rate_ref: Ref, *refs: Ref) -> None:
    """`refs`: queries, keys, values, first state; outputs, last state; their buffers, the state, the values times their
    decay, and a barrier for what arrives."""
    q_ref, k_ref, v_ref, first_ref, o_ref, last_ref, q, k, v, state, decayed, full = refs
    ops, length, steps, stages, reverse = launch.ops, launch.length, launch.steps, launch.stages, launch.reverse
    b, h, e = (lax.axis_index(name) for name in ("row", "head", "part"))
    C, columns = CHUNK, pl.ds(e * WIDTH, WIDTH)
    rate = rate_ref[h]  # of the base-2 logarithm

    def tokens(step: jax.Array) -> Any:
        return pl.ds((steps - 1 - step if reverse else step) * C, C)

    def fetch(step: jax.Array) -> None:
        slot = lax.rem(step, jnp.int32(stages))
        for ref, buffer, width in ((q_ref, q, slice(None)), (k_ref, k, slice(None)), (v_ref, v, columns)):
            hopper.copy_in(ref.at[b, tokens(step), h, width], buffer.at[slot], full.at[slot])

    for step in range(min(stages, steps)):
        fetch(jnp.int32(step))

    i, j = ops.iota((C, C), 0), ops.iota((C, C), 1)
    ahead = j - i if reverse else i - j
    powers = jnp.where(ahead >= 0, jnp.exp2(rate * ahead.astype(jnp.float32)), 0.0)
    row = ops.iota((C, WIDTH), 0)

    def per_token(count: jax.Array) -> jax.Array:
        return jnp.exp2(rate * count.astype(jnp.float32))

    def chunk(step: jax.Array, S: jax.Array) -> jax.Array:
        slot = lax.rem(step, jnp.int32(stages))
        n = jnp.int32(C)
        if length % C:  # the last chunk is padded with zeros
            n = jnp.minimum(n, length - C * (steps - 1 - step if reverse else step))
        early, late = per_token(row + 1), per_token(jnp.maximum(n - 1 - row, 0))
        read, write = (late, early) if reverse else (early, late)
        state[...] = S.astype(jnp.bfloat16)
        hopper.wait(full.at[slot])
        values = ops.load(v, (slot,), plgpu.Layout.WGMMA)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last outputs have left the buffer
        decayed[...] = (values.astype(jnp.float32) * write).astype(jnp.bfloat16)
        plgpu.commit_smem()
        out = ops.dot(q.at[slot], state) * read
        weight = (ops.dot(q.at[slot], k.at[slot], transpose_b=True) * powers).astype(jnp.bfloat16)
        out = ops.dot(weight, v.at[slot], acc=out)
        S = ops.dot(k.at[slot], decayed, transpose_a=True, acc=S * jnp.exp2(rate * n.astype(jnp.float32)))
        decayed[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        hopper.copy_out(decayed, o_ref.at[b, tokens(step), h, columns])

        @pl.when(step + stages < steps)
        def _() -> None:
            fetch(step + stages)

        return S

    mine = b, h, slice(None), columns
    S = lax.fori_loop(0, steps, chunk, ops.load(first_ref, mine, plgpu.Layout.WGMMA, optimized=False))
    last_ref[mine] = S
    plgpu.wait_smem_to_gmem(0)


def chunked(
    q_BHTD: jax.Array, k_BHTD: jax.Array, v_BHTE: jax.Array, problem: Problem, how: How = AUTO
) -> tuple[jax.Array, jax.Array]:
    """The same as `reference.chunked`, widths up to 128 of queries, bfloat16."""
    B, H, T, D = q_BHTD.shape
    E = v_BHTE.shape[-1]
    stages, reverse = _ahead(how), problem.reverse
    rest = -T % CHUNK, -D % WIDTH, -E % WIDTH
    # Heads behind tokens: where the caller swapped them, XLA removes both.
    q, k, v = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, rest[0]), (0, 0), (0, -x.shape[-1] % WIDTH)))
        for x in (q_BHTD, k_BHTD, v_BHTE)
    )
    first = jnp.pad(problem.state.astype(jnp.float32), ((0, 0), (0, 0), (0, rest[1]), (0, rest[2])))
    (Tp, _, Dp), Ep = q.shape[1:], v.shape[-1]
    steps = Tp // CHUNK
    bf16 = jnp.bfloat16
    out, state = plgpu.kernel(
        functools.partial(_kernel, Launch(hopper.Ops(bool(how.interpret)), T, steps, stages, reverse)),
        out_type=[
            jax.ShapeDtypeStruct((B, Tp, H, Ep), bf16),
            jax.ShapeDtypeStruct((B, H, Dp, Ep), jnp.float32),
        ],
        grid=(Ep // WIDTH, H, B),
        grid_names=("part", "head", "row"),
        scratch_types=[
            hopper.smem((stages, CHUNK, Dp), bf16),
            hopper.smem((stages, CHUNK, Dp), bf16),
            hopper.smem((stages, CHUNK, WIDTH), bf16),
            hopper.smem((Dp, WIDTH), bf16),
            hopper.smem((CHUNK, WIDTH), bf16),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=hopper.params(bool(how.interpret)),
        kernel_name="lightning_reverse" if reverse else "lightning",
    )(problem.rate.astype(jnp.float32) * math.log2(math.e), q, k, v, first)
    return jnp.swapaxes(out, 1, 2)[:, :, :T, :E], state[:, :, :D, :E]
