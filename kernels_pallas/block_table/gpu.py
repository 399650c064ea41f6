"""Mosaic GPU kernel (Hopper) of attention to listed key blocks: lists as words, the call, the merge of parts.

A *unit* is one query block of one row and head (or of the heads of one key head, if they share a list), as on a TPU. A
block of threads (gpu_kernel.py) takes up to 64 rows of a unit in one warpgroup, which also fetches; two such blocks
share a multiprocessor. Or it takes 128 rows in two warpgroups that compute, and a third fetches for both.

The list is cut down before (`words`): what is empty, listed twice, past the row's length or later than every query is
gone. The kernel reads it from shared memory as scalars. Each listed block arrives by TMA in tiles of at most `tile`
keys, `stages` tiles ahead of the products. Scores, weights and sums stay in registers. Turned queries pass through
shared memory, once per entry. Blocks that every query sees whole are computed without a mask.

What lies past a row's length is never read. A tile that would reach there starts earlier, and its first keys are
masked. Rows shorter than a tile are read from a copy of their first tile, with zeros past the length.

Where units do not fill the chip (`fill` blocks of threads), the lists are cut into parts, which are merged by
log-sum-exp. Fewer than 64 queries of a unit, one token at a time say, still cost the matrix unit 64 rows: there the
fetch decides.

Registers of a computing thread, d 128: output 64, scores and weights 64 and 32. Shared memory (`Plan.memory`), d 128: 2
stages of 128 keys for 128 rows 166 KiB, 198 with turns; of 64 keys for 64 rows 86 KiB. Traffic: 2 w d values per listed
block and 128 (64) rows. Work: 4 R w d operations per listed block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.block_table.gpu_kernel import Launch, kernel, scratch
from kernels_pallas.block_table.gpu_plan import ID_BITS, ROWS, TURN_BITS, WHOLE, choose
from kernels_pallas.block_table.problem import Filled
from kernels_pallas.block_table.reference import from_units, in_units, turning
from kernels_pallas.common import AUTO, NEG, How


def words(ids: jax.Array, turn: jax.Array | None, at_BQR: jax.Array, end_B: jax.Array, w: int, N: int) -> jax.Array:
    """The lists ``[B, h, Q, n]`` as int32 ``[B, h, Q, 2 + n]``: how many words count, slots of the row, the words.

    A word: key block, turn, and whether every query sees it whole. What a first entry has already listed, what is
    empty, and what no query sees goes to the end.
    """
    n = ids.shape[-1]
    end, last, first = (x[:, None, :, None] for x in (end_B[:, None], at_BQR.max(-1), at_BQR.min(-1)))
    twice = ((ids[..., :, None] == ids[..., None, :]) & (jnp.arange(n)[:, None] > jnp.arange(n))).any(-1)
    use = (ids >= 0) & (ids < N) & (ids * w < end) & (ids * w <= last) & ~twice
    turn = jnp.zeros_like(ids) if turn is None else jnp.clip(turn, 0, (1 << TURN_BITS) - 1)
    whole = ((ids + 1) * w <= end) & ((ids + 1) * w - 1 <= first)
    word = jnp.where(use, ids | (turn << ID_BITS) | jnp.where(whole, WHOLE, 0), 1 << 30)
    count = use.sum(-1, keepdims=True, dtype=jnp.int32)
    return jnp.concatenate([count, jnp.broadcast_to(end, count.shape).astype(jnp.int32), lax.sort(word)], -1)


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    blocks_BhQn: jax.Array,
    problem: Filled,
    how: How = AUTO,
) -> tuple[jax.Array, jax.Array]:
    """The same as `reference.reference`, in bfloat16."""
    B, T, H, d = q_BTHd.shape
    K, S = k_BKSd.shape[1:3]
    h, Q, n = blocks_BhQn.shape[1:]
    U, w, q_block, m = B * h * Q, problem.block_size, problem.q_block, problem.pairs
    bf16, f32 = jnp.bfloat16, jnp.float32
    p = choose(q_BTHd, blocks_BhQn.shape, w, q_block, m, how)
    assert p is not None  # `gpu_plan.refusal`
    q, at = in_units(q_BTHd, problem.positions, h, q_block)
    end = jnp.minimum(problem.lengths, S).astype(jnp.int32)
    lists = words(blocks_BhQn, problem.turn, at, end, w, -(-S // w)).reshape(U, -1)
    lists = jnp.pad(lists, ((0, 0), (0, p.length - lists.shape[1])))
    R = q.shape[3]
    tiles = -(-R // p.rows)
    whole = tiles * p.groups * ROWS
    at = jnp.pad(at.reshape(B * Q, R), ((0, 0), (0, whole - R)), constant_values=-1)
    live = (jnp.arange(p.tile) < end[:, None])[:, None, :, None]
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, max(0, p.tile - S)), (0, 0))) for x in (k_BKSd, v_BKSd))
    short = [jnp.where(live, x[:, :, : p.tile], 0).reshape(B * K, p.tile, d) for x in (k, v)]
    queries = [jnp.pad(q.reshape(U, R, d), ((0, 0), (0, tiles * p.rows - R), (0, 0)))]
    if problem.angles is not None:
        queries += turning(queries[0], problem.angles)[0]
    partial = p.parts > 1
    launch = Launch(hopper.Ops(bool(how.interpret)), p, (K, h, Q, w, tiles), problem.scale, problem.softcap)
    out, lse = plgpu.kernel(
        functools.partial(kernel, launch),
        out_type=[
            jax.ShapeDtypeStruct((U * p.parts, tiles * p.rows, d), f32 if partial else bf16),
            jax.ShapeDtypeStruct((U * p.parts, whole), f32),
        ],
        grid=(U * tiles * p.parts,),
        grid_names=("block",),
        num_threads=p.groups + 1 if p.groups > 1 else None,
        thread_name="group" if p.groups > 1 else None,
        scratch_types=scratch(p),
        # By lanes, as the layouts here are written; by warpgroups, the default of later versions, does not infer them.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=hopper.params(bool(how.interpret)),
        kernel_name="block_table",
    )(lists, at, k.reshape(B * K, -1, d), v.reshape(B * K, -1, d), *short, *queries)
    if partial:
        out, lse = _merge(out.reshape(U, p.parts, -1, d)[:, :, :R], lse.reshape(U, p.parts, -1)[:, :, :R])
    return (
        from_units(out[:, :R].astype(bf16).reshape(B, h, Q, R, d), T, H, q_block),
        from_units(lse[:, :R].reshape(B, h, Q, R), T, H, q_block),
    )


def _merge(out_UpRd: jax.Array, lse_UpR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One softmax of the parts of lists."""
    top = jnp.maximum(lse_UpR.max(1, keepdims=True), NEG)
    share = jnp.exp(lse_UpR - top)
    total = share.sum(1, keepdims=True)
    some = jnp.where(total > 0, total, 1.0)
    out = ((share / some)[..., None] * out_UpRd).sum(1)
    return out, (top + jnp.log(total))[:, 0]
