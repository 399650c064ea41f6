"""Mosaic TPU kernel of tree attention against a cache.

One program per (row, key head): its G * N queries stay in VMEM, the tree's own keys begin the softmax, and a grid step
per `tile_s` slots of the cache goes on with it. Lengths are known before the grid starts (scalar prefetch): tiles past
a row's length are neither fetched nor computed. HBM sees the valid cache once, which is the cost: 2 d bytes * 2 per
slot and key head in bfloat16; the tree comes almost free until G * N rows fill the matrix unit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas.common import AUTO, CHIPS, MIB, NEG, How, Index, Ref, Shaped, blocks, precision, vmem
from kernels_pallas.tree_decode.problem import Filled

LANES = 128
SCORES = 4 * MIB  # bytes the scores of one step may take; many queries get narrower tiles
ROWS = 2048  # queries G * N that fit


def choose_tile(S: int, rows: int, chip: str | None) -> int:
    """Slots per grid step: the chip's, fewer if the scores would not fit, all if there are no more."""
    fitting = max(LANES, SCORES // (4 * rows) // LANES * LANES)
    return min(blocks("tree_decode", chip if chip in CHIPS else None)["tile_s"], fitting, S)


def memory(tile_s: int, rows: int, N: int, d: int, dtype: DTypeLike) -> int:
    """Bytes of VMEM of one grid step: two buffers of every block, the scratch, scores and weights."""
    size = jnp.dtype(dtype).itemsize
    buffers = (2 * tile_s + 2 * N + 2 * rows) * d * size + 4 * N * max(N, LANES) + 4 * rows * LANES
    return 2 * buffers + 4 * rows * (d + 2 * LANES) + 2 * 4 * rows * max(tile_s, N)


def refusal(q_BNHd: Shaped, k_BKSd: Shaped) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None."""
    _, N, H, d = q_BNHd.shape
    rows = padded(N) * (H // k_BKSd.shape[1])
    if rows > ROWS:
        return f"{rows} queries per key head, the kernel holds up to {ROWS}"
    if d > 256:
        return f"head width {d}, the kernel holds up to 256"
    return None


def padded(N: int) -> int:
    """Nodes as the kernel holds them: whole tiles of bfloat16, 16 rows each."""
    return -(-N // 16) * 16


def _kernel(scale: float, tile_s: int, slots: int, lengths_ref: Ref, *refs: Ref) -> None:
    """`refs`: queries, keys, values, the tree's own, its mask; output, log-sum-exp; scratch of output, top, total."""
    q_ref, k_ref, v_ref, new_k_ref, new_v_ref, mask_ref, o_ref, lse_ref, out, top, total = refs
    step = pl.program_id(2)
    length = jnp.minimum(lengths_ref[pl.program_id(0)], slots)
    q = q_ref[0, 0]
    rows, N = q.shape[0], mask_ref.shape[1]
    dot = functools.partial(jax.lax.dot_general, precision=precision(q.dtype), preferred_element_type=jnp.float32)

    def add(k: jax.Array, v: jax.Array, seen: jax.Array) -> None:
        scores = jnp.where(seen, scale * dot(q, k, (((1,), (1,)), ((), ()))), NEG)
        before = top[:, :1]
        higher = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
        shrink = jnp.exp(before - higher)
        out[...] = out[...] * shrink + dot(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        top[...] = jnp.broadcast_to(higher, top.shape)

    @pl.when(step == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, NEG)
        mask = mask_ref[0]
        every = jnp.broadcast_to(mask[None], (rows // N, N, N)).reshape(rows, N)  # the same for each head of the group
        add(new_k_ref[0, 0], new_v_ref[0, 0], every != 0)

    @pl.when(step * tile_s < length)
    def _() -> None:
        left = length - step * tile_s
        along = jax.lax.broadcasted_iota(jnp.int32, (1, tile_s), 1)
        down = jax.lax.broadcasted_iota(jnp.int32, (tile_s, 1), 0)
        v = v_ref[0, 0]
        # Slots past the length hold anything, NaN too, and 0 * NaN would reach the output.
        add(k_ref[0, 0], jnp.where(down < left, v.astype(jnp.float32), 0.0).astype(v.dtype), along < left)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        sums = total[...]
        o_ref[0, 0] = (out[...] / jnp.where(sums > 0, sums, 1.0)[:, :1]).astype(o_ref.dtype)
        lse_ref[0, 0] = jnp.where(sums > 0, top[...] + jnp.log(sums), -jnp.inf)


def tree_decode(
    q_BNHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, problem: Filled, how: How = AUTO
) -> tuple[jax.Array, jax.Array]:
    """The same as `reference.reference`."""
    B, nodes, H, d = q_BNHd.shape
    K, S = k_BKSd.shape[1:3]
    G, N = H // K, padded(nodes)
    rows = G * N
    more = ((0, 0), (0, N - nodes), (0, 0), (0, 0))
    q = jnp.pad(q_BNHd, more).reshape(B, N, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, rows, d)
    new_k, new_v = (jnp.swapaxes(jnp.pad(x, more), 1, 2) for x in (problem.new_k, problem.new_v))
    mask = jnp.pad(problem.mask.astype(jnp.int32), ((0, 0), (0, N - nodes), (0, N - nodes)))
    tile_s = how.size("tile_s")
    tile = min(tile_s, S) if tile_s else choose_tile(S, rows, how.chip)

    def cache(b: Index, h: Index, j: Index, lengths: Ref) -> tuple[Index, ...]:
        last = jax.lax.div(jnp.minimum(lengths[b], S) - 1, tile)  # nothing new is fetched past the row's last tile
        return b, h, jnp.clip(j, 0, jnp.maximum(last, 0)), 0

    def whole(b: Index, h: Index, j: Index, lengths: Ref) -> tuple[Index, ...]:
        return b, h, 0, 0

    def masks(b: Index, h: Index, j: Index, lengths: Ref) -> tuple[Index, ...]:
        return (b if mask.shape[0] > 1 else 0), 0, 0

    out, lse = pl.pallas_call(
        functools.partial(_kernel, problem.scale, tile, S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, pl.cdiv(S, tile)),
            in_specs=[
                pl.BlockSpec((1, 1, rows, d), whole),
                pl.BlockSpec((1, 1, tile, d), cache),
                pl.BlockSpec((1, 1, tile, d), cache),
                pl.BlockSpec((1, 1, N, d), whole),
                pl.BlockSpec((1, 1, N, d), whole),
                pl.BlockSpec((1, N, N), masks),
            ],
            out_specs=[pl.BlockSpec((1, 1, rows, d), whole), pl.BlockSpec((1, 1, rows, LANES), whole)],
            scratch_shapes=[
                pltpu.VMEM((rows, d), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, K, rows, d), q.dtype),
            jax.ShapeDtypeStruct((B, K, rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem(how.chip)
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * K * rows * S * d,
            transcendentals=B * K * rows * S,
            bytes_accessed=2 * B * K * S * d * q.dtype.itemsize,
        ),
        interpret=how.interpret,
        name="tree_decode",
    )(problem.lengths.astype(jnp.int32), q, k_BKSd, v_BKSd, new_k, new_v, mask)
    out = out.reshape(B, K, G, N, d).transpose(0, 3, 1, 2, 4).reshape(B, N, H, d)
    lse = lse[..., 0].reshape(B, K, G, N).transpose(0, 3, 1, 2).reshape(B, N, H)
    return out[:, :nodes], lse[:, :nodes]
