"""Mosaic TPU kernel of linear attention in chunks, in both directions.

One program per (batch, head), a grid step per chunk. The state [D, E] stays in VMEM in float32 from chunk to chunk, and
so do the powers of the decay [C, C]. A chunk is four products: q k^T, that times v, q times the state, and k^T v;
2 C (D + E) + 4 D E operations per token and head, whatever the length. HBM sees every array once. The backward pass is
three such scans (api.py), 12 products per chunk where a fused kernel would need 11. The equations are in reference.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas.common import AUTO, How, Ref, Shaped, precision, vmem
from kernels_pallas.lightning.problem import Problem


def memory(chunk: int, D: int, E: int, dtype: DTypeLike) -> int:
    """Bytes of VMEM of one grid step: two buffers of every block, the scratch, and the products of a chunk."""
    buffers = chunk * 2 * (D + E) * jnp.dtype(dtype).itemsize + 2 * D * E * 4
    return 2 * buffers + D * E * 4 + 3 * chunk * chunk * 4


def refusal(q_BHTD: Shaped, v_BHTE: Shaped) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None."""
    D, E = q_BHTD.shape[-1], v_BHTE.shape[-1]
    if max(D, E) > 512:
        return f"head widths {D} and {E}, the kernel holds up to 512"
    return None


def _kernel(length: int, chunk: int, reverse: bool, rate_ref: Ref, *refs: Ref) -> None:
    """`refs`: queries, keys, values, first state; outputs, last state; scratch of the state and of the powers."""
    q_ref, k_ref, v_ref, first_ref, o_ref, last_ref, state, powers = refs
    rate = rate_ref[pl.program_id(1)]
    step, steps = pl.program_id(2), pl.num_programs(2)
    dtype = q_ref.dtype
    dot = functools.partial(jax.lax.dot_general, precision=precision(dtype), preferred_element_type=jnp.float32)

    @pl.when(step == 0)
    def _() -> None:
        state[...] = first_ref[0, 0]
        i, j = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
        ahead = j - i if reverse else i - j
        decayed = jnp.exp(rate * jnp.maximum(ahead, 0).astype(jnp.float32))
        powers[...] = jnp.where(ahead >= 0, decayed, 0.0)

    q, k, v = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0]
    n = jnp.int32(chunk)
    row = jax.lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
    if length % chunk:  # the last block reaches past the end, where anything may lie
        n = jnp.minimum(chunk, length - chunk * (steps - 1 - step if reverse else step))
        k = jnp.where(row < n, k.astype(jnp.float32), 0.0).astype(dtype)
        v = jnp.where(row < n, v.astype(jnp.float32), 0.0).astype(dtype)
    early, late = (row + 1).astype(jnp.float32), jnp.maximum(n - 1 - row, 0).astype(jnp.float32)
    read, write = (late, early) if reverse else (early, late)

    weight = dot(q, k, (((1,), (1,)), ((), ()))) * powers[...]
    out = dot(weight.astype(dtype), v, (((1,), (0,)), ((), ())))
    out += jnp.exp(rate * read) * dot(q, state[...].astype(dtype), (((1,), (0,)), ((), ())))
    o_ref[0, 0] = out.astype(dtype)
    kept = (k.astype(jnp.float32) * jnp.exp(rate * write)).astype(dtype)
    whole = jnp.exp(jnp.full((1, state.shape[1]), rate * n.astype(jnp.float32)))
    state[...] = whole * state[...] + dot(kept, v, (((0,), (0,)), ((), ())))

    @pl.when(step == steps - 1)
    def _() -> None:
        last_ref[0, 0] = state[...]


def chunked(
    q_BHTD: jax.Array, k_BHTD: jax.Array, v_BHTE: jax.Array, problem: Problem, how: How = AUTO
) -> tuple[jax.Array, jax.Array]:
    """The same as `reference.chunked`."""
    B, H, T, D = q_BHTD.shape
    E = v_BHTE.shape[-1]
    C, reverse = min(how.blocks("lightning", how.chip)["chunk"], T), problem.reverse
    steps = pl.cdiv(T, C)

    def tokens(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, C, width), lambda b, h, c: (b, h, steps - 1 - c if reverse else c, 0))

    states = pl.BlockSpec((1, 1, D, E), lambda b, h, c: (b, h, 0, 0))
    products = B * H * T
    out, state = pl.pallas_call(
        functools.partial(_kernel, T, C, reverse),
        grid=(B, H, steps),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), tokens(D), tokens(D), tokens(E), states],
        out_specs=[tokens(E), states],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, T, E), q_BHTD.dtype),
            jax.ShapeDtypeStruct((B, H, D, E), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((D, E), jnp.float32), pltpu.VMEM((C, C), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem(how.chip)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * (C * (D + E) + 2 * D * E),
            transcendentals=3 * products,
            bytes_accessed=products * 2 * (D + E) * q_BHTD.dtype.itemsize + 8 * B * H * D * E,
        ),
        interpret=how.interpret,
        name="lightning_reverse" if reverse else "lightning",
    )(problem.rate.astype(jnp.float32), q_BHTD, k_BHTD, v_BHTE, problem.state.astype(jnp.float32))
    return out, state
