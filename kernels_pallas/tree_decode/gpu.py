"""Mosaic GPU kernel (Hopper) of tree attention against a cache.

The G * N queries of a key head are rows, 64 for each of one or two compute warpgroups; a third copies tiles of `tile_s`
slots ahead (TMA), keys and values each on barriers of their own. The cache is cut over `splits` blocks of threads, so
that one row of eight key heads fills the chip, each with a running softmax over its share of what is valid (to base 2);
one more block takes the tree's own keys. XLA merges them by log-sum-exp, with the division (flash-decoding).

A tile of 128 slots of width 128 takes 32 KiB, and as much of values; with 32 KiB of queries three stages fit 227
KiB: 224 KiB a block, one block an SM. Registers a thread, width 128: 64 for the output, 64 for scores, 32 for weights;
width 256: 128, 32, 16 (tiles of 64). HBM sees the valid cache once for every 128 rows (a second reading may find it in
L2), and `splits` partial outputs in float32. Rows past G * N are computed in vain: one node costs what 64 do.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.common import GPUS, NEG, blocks

ROWS = 64  # of a compute warpgroup
LOG2E = math.log2(math.e)


class Plan(NamedTuple):
    """How a call is cut: `blocks` of rows of the compute warpgroups, tiles of `tile` slots, `splits` of the cache."""

    warpgroups: int
    blocks: int
    tile: int
    stages: int
    splits: int


def plan(q_BNHd: Any, k_BKSd: Any, tile_s: int | None = None, **given: int | None) -> Plan:
    """The plan of a call that is not refused. `tile_s` and `given` win over `BLOCKS`; wide heads get narrower tiles."""
    size = blocks("tree_decode", "h100", tile_s=tile_s, **given)
    B, N, H, d = q_BNHd.shape
    K, S = k_BKSd.shape[1:3]
    rows = N * (H // K)
    warpgroups = 1 if rows <= ROWS else 2
    n_blocks = -(-rows // (warpgroups * ROWS))
    tile = size["tile_s"] if d <= 128 else size["tile_s"] // 2
    room = GPUS["h100"].smem - 1024 - warpgroups * ROWS * d * 2
    tiles, work = -(-S // tile), B * K * n_blocks
    most = min(tiles, max(4, size["ctas"] // work))

    def busy(splits: int) -> tuple[float, int]:
        """Share of the SMs at work, to a tenth; then fewer splits are better."""
        total = splits * work
        return round(total / (-(-total // size["ctas"]) * size["ctas"]), 1), -splits

    stages = max(2, min(size["stages"], room // (4 * tile * d)))
    return Plan(warpgroups, n_blocks, tile, stages, max(range(1, most + 1), key=busy))


def memory(p: Plan, d: int) -> int:
    """Bytes of shared memory of a block."""
    return 2 * d * (p.warpgroups * ROWS + 2 * p.stages * p.tile)


def refusal(q_BNHd: Any, k_BKSd: Any, tile_s: int | None = None) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None."""
    d = q_BNHd.shape[-1]
    if tile_s not in (None, 128):
        return f"tiles of {tile_s} slots, the kernel has 128"
    if q_BNHd.dtype != jnp.bfloat16:
        return f"dtype {q_BNHd.dtype}, the kernel takes bfloat16"
    if d % 16 or d > 256:
        return f"head width {d}, the kernel has multiples of 16 up to 256"
    if (S := k_BKSd.shape[2]) % 8 and S > (128 if d <= 128 else 64):
        return f"a cache of {S} slots, the kernel takes multiples of 8"
    return None


def _kernel(o: hopper.Ops, p: Plan, scale: float, slots: int, heads: int, *refs: Any) -> None:
    """q [BK, rows, d], k, v [B, K, S, d], own k, v [B, N, K, d], mask [1 or B, rows, N], lengths [B]
    -> out [splits + 1, BK, rows, d], top and total [splits + 1, BK, rows]; then the buffers and barriers."""
    q_ref, k_ref, v_ref, new_k_ref, new_v_ref, mask_ref, lengths_ref, *refs_ = refs
    out_ref, top_ref, total_ref, q_buffer, k_buffer, v_buffer, q_ready, k_ready, v_ready, k_free, v_free, clean = refs_
    split, head, block = lax.axis_index("split"), lax.axis_index("head"), lax.axis_index("block")
    thread = lax.axis_index("wg")
    b, key_head = lax.div(head, jnp.int32(heads)), lax.rem(head, jnp.int32(heads))
    d, tile = q_ref.shape[-1], jnp.int32(p.tile)
    own = split == p.splits  # the block of the tree's own keys
    length = jnp.clip(lengths_ref[b], 0, slots)
    tiles = lax.div(length + tile - 1, tile)
    share = lax.div(tiles + p.splits - 1, jnp.int32(p.splits))
    first = jnp.where(own, 0, split * share)
    count = jnp.where(own, jnp.int32(new_k_ref.shape[1] // p.tile), jnp.clip(tiles - first, 0, share))

    def slot(i: Any) -> Any:
        return lax.rem(i, jnp.int32(p.stages))

    def start(i: Any) -> Any:
        """The first slot of a tile; the last one ends with the cache, and overlaps the one before."""
        return pl.multiple_of(jnp.minimum((first + i) * tile, slots - tile), 8)  # copies are of whole tiles of 8

    @pl.when(thread < p.warpgroups)
    def _() -> None:
        if p.warpgroups > 1:
            plgpu.set_max_registers(232, action="increase")
        row = (block * p.warpgroups + thread) * ROWS
        q = q_buffer.at[thread]
        plgpu.barrier_wait(q_ready)

        def step(i: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, top, total = state
            at, left = slot(i), length - start(i)  # slots of the tile that are valid, from its first on
            twice = (first + i) * tile - start(i)  # slots that the tile before has counted
            plgpu.barrier_wait(k_ready.at[at])
            scores = o.dot(q, k_buffer.at[at], transpose_b=True) * (scale * LOG2E)
            plgpu.barrier_arrive(k_free.at[at])
            column = functools.partial(o.iota, scores.shape, 1)

            def tree(scores: jax.Array) -> jax.Array:
                where = (lax.rem(b, jnp.int32(mask_ref.shape[0])), pl.ds(row, ROWS), pl.ds(i * tile, p.tile))
                seen = o.load(mask_ref, where, plgpu.Layout.WGMMA, optimized=False)
                return jnp.where(seen.astype(jnp.int32) != 0, scores, NEG)

            def cached(scores: jax.Array) -> jax.Array:
                return jnp.where((column() >= twice) & (column() < left), scores, NEG)

            def partial(scores: jax.Array) -> jax.Array:
                return lax.cond((left < tile) | (twice > 0), cached, lambda scores: scores, scores)

            scores = lax.cond(own, tree, partial, scores)
            higher = jnp.maximum(top, scores.max(axis=1))
            base = jnp.where(higher < NEG / 2, 0.0, higher)  # of a row that has seen nothing, all weights are 0
            weights = jnp.exp2(scores - lax.broadcast_in_dim(base, scores.shape, [0]))
            shrink = jnp.exp2(top - base)
            total = total * shrink + weights.sum(axis=1)
            plgpu.barrier_wait(v_ready.at[at])

            # Slots past the length hold anything, NaN too, and 0 * NaN would reach the output.
            @pl.when((left < tile) & jnp.logical_not(own))
            def _() -> None:
                @pl.when(thread == 0)
                def _() -> None:
                    for piece in range(0, p.tile, 64):
                        rows = v_buffer.at[at, pl.ds(piece, 64)]
                        values = o.load(rows, (...,), plgpu.Layout.WGMMA)
                        valid = o.iota(values.shape, 0) < left - piece
                        rows[...] = jnp.where(valid, values, jnp.zeros_like(values))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(clean)

                plgpu.barrier_wait(clean)  # once at most: only the last tile of a row is partial

            out = out * lax.broadcast_in_dim(shrink, out.shape, [0])
            out = o.dot(weights.astype(jnp.bfloat16), v_buffer.at[at], acc=out)
            plgpu.barrier_arrive(v_free.at[at])
            return out, higher, total

        nothing = o.per_row(jnp.full((ROWS,), NEG, jnp.float32)), o.per_row(jnp.zeros((ROWS,), jnp.float32))
        out, top, total = lax.fori_loop(0, count, step, (o.tile(jnp.zeros((ROWS, d), jnp.float32)), *nothing))
        place = (split, head, pl.ds(row, ROWS))
        out_ref[place] = out
        top_ref[place] = top
        total_ref[place] = total

    @pl.when(thread == p.warpgroups)
    def _() -> None:
        if p.warpgroups > 1:
            plgpu.set_max_registers(40, action="decrease")
        for w in range(p.warpgroups):
            rows = pl.ds((block * p.warpgroups + w) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[head, rows], q_buffer.at[w], q_ready)

        def fetch(i: Any, old: Any, new: Any, buffer: Any, ready: Any) -> None:
            @pl.when(own)
            def _() -> None:
                plgpu.copy_gmem_to_smem(
                    new.at[b, pl.ds(i * tile, p.tile), key_head], buffer.at[slot(i)], ready.at[slot(i)]
                )

            @pl.when(jnp.logical_not(own))
            def _() -> None:
                plgpu.copy_gmem_to_smem(
                    old.at[b, key_head, pl.ds(start(i), p.tile)], buffer.at[slot(i)], ready.at[slot(i)]
                )

        keys = functools.partial(fetch, old=k_ref, new=new_k_ref, buffer=k_buffer, ready=k_ready)
        values = functools.partial(fetch, old=v_ref, new=new_v_ref, buffer=v_buffer, ready=v_ready)
        for i in range(p.stages):

            @pl.when(i < count)
            def _(i: int = i) -> None:
                keys(jnp.int32(i))
                values(jnp.int32(i))

        @pl.loop(p.stages, jnp.maximum(count, p.stages))
        def _(i: Any) -> None:
            plgpu.barrier_wait(k_free.at[slot(i)])
            keys(i)
            plgpu.barrier_wait(v_free.at[slot(i)])
            values(i)

        @pl.loop(jnp.maximum(count - p.stages, 0), count)  # the interpreter wants every arrival seen
        def _(i: Any) -> None:
            plgpu.barrier_wait(k_free.at[slot(i)])
            plgpu.barrier_wait(v_free.at[slot(i)])


def tree_decode(
    q_BNHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    lengths_B: jax.Array,
    new_k_BNKd: jax.Array,
    new_v_BNKd: jax.Array,
    mask_BNN: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
    **given: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The same as `reference.reference`. `given`: of `tile_s`, `stages`, `ctas`."""
    B, N, H, d = q_BNHd.shape
    K, G = k_BKSd.shape[1], H // k_BKSd.shape[1]
    p = plan(q_BNHd, k_BKSd, **given)
    missing = max(0, p.tile - k_BKSd.shape[2])  # of a cache shorter than a tile
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else x for x in (k_BKSd, v_BKSd))
    rows, nodes = p.blocks * p.warpgroups * ROWS, -(-N // p.tile) * p.tile
    more = ((0, 0), (0, nodes - N))
    new_k, new_v = (jnp.pad(x, (*more, (0, 0), (0, 0))) for x in (new_k_BNKd, new_v_BNKd))
    q = q_BNHd.reshape(B, N, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B * K, G * N, d)
    q = jnp.pad(q, ((0, 0), (0, rows - G * N), (0, 0)))
    mask = jnp.pad(jnp.tile(mask_BNN.astype(jnp.int8), (1, G, 1)), ((0, 0), (0, rows - G * N), more[1]))
    swizzle = next(bytes_ for bytes_ in (128, 64, 32) if 2 * d % bytes_ == 0)
    tiles = hopper.smem((p.stages, p.tile, d), q.dtype, swizzle)
    array: Any = jax.ShapeDtypeStruct
    per_row = array((p.splits + 1, B * K, rows), jnp.float32)
    ready = plgpu.Barrier(num_barriers=p.stages)
    free = plgpu.Barrier(num_arrivals=p.warpgroups, num_barriers=p.stages)
    out, top, total = plgpu.kernel(
        functools.partial(_kernel, hopper.Ops(interpret), p, scale, k.shape[2], K),
        out_type=[array((p.splits + 1, B * K, rows, d), jnp.float32), per_row, per_row],
        grid=(p.splits + 1, B * K, p.blocks),
        grid_names=("split", "head", "block"),
        num_threads=p.warpgroups + 1,
        thread_name="wg",
        scratch_types=[
            hopper.smem((p.warpgroups, ROWS, d), q.dtype, swizzle),
            tiles,
            tiles,
            plgpu.Barrier(num_arrivals=p.warpgroups),
            ready,
            ready,
            free,
            free,
            plgpu.Barrier(),
        ],
        interpret=hopper.params(interpret),
    )(
        q,
        k,
        v,
        new_k,
        new_v,
        mask,
        jnp.minimum(lengths_B, k_BKSd.shape[2]).astype(jnp.int32),
    )
    highest = jnp.max(top, axis=0)
    weight = jnp.exp2(top - highest)
    sums = jnp.sum(weight * total, axis=0)
    merged = jnp.sum(weight[..., None] * out, axis=0) / jnp.where(sums > 0, sums, 1.0)[..., None]
    lse = jnp.where(sums > 0, (highest + jnp.log2(sums)) / LOG2E, -jnp.inf)
    merged = merged[:, : G * N].reshape(B, K, G, N, d).transpose(0, 3, 1, 2, 4).reshape(B, N, H, d)
    return merged.astype(q.dtype), lse[:, : G * N].reshape(B, K, G, N).transpose(0, 3, 1, 2).reshape(B, N, H)
