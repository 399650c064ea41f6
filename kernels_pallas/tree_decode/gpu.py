"""Mosaic GPU kernel (Hopper) of tree attention against a cache.

The G * N queries of a key head are rows, 64 for each of one or two compute warpgroups. One more warpgroup copies tiles
of `tile_s` slots ahead (TMA), keys and values on barriers of their own. The cache is cut over `splits` blocks of
threads, so that one row of eight key heads fills the chip. Each has a running softmax (to base 2) over its share of
what is valid. One more block takes the tree's own keys. XLA merges them by log-sum-exp, and divides (flash-decoding).

A tile of 128 slots of width 128 takes 32 KiB for keys and as much for values. With 32 KiB of queries three stages take
224 of 227 KiB: one block an SM. Registers a thread, width 128: 64 for the output, 64 for scores, 32 for weights; width
256: 128, 32, 16 (tiles of 64). HBM sees the valid cache once for every 128 rows (a second reading may find it in L2),
and `splits` partial outputs in float32. Rows past G * N are computed in vain: one node costs what 64 do.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.common import AUTO, GPUS, NEG, How, Ref, Shaped
from kernels_pallas.tree_decode.problem import Filled

ROWS = 64  # of a compute warpgroup
LOG2E = math.log2(math.e)


class Plan(NamedTuple):
    """How a call is cut: `blocks` of rows of the compute warpgroups, tiles of `tile` slots, `splits` of the cache."""

    warpgroups: int
    blocks: int
    tile: int
    stages: int
    splits: int


@dataclass(frozen=True)
class Launch:
    """What is static in the kernel. `slots` of the cache, key `heads`."""

    ops: hopper.Ops
    plan: Plan
    scale: float
    slots: int
    heads: int


def plan(q_BNHd: Shaped, k_BKSd: Shaped, how: How = AUTO) -> Plan:
    """The plan of a call that is not refused. Wide heads get narrower tiles."""
    size = how.blocks("tree_decode", "h100")
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


def refusal(q_BNHd: Shaped, k_BKSd: Shaped, how: How = AUTO) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None."""
    d, tile_s = q_BNHd.shape[-1], how.size("tile_s")
    if tile_s not in (None, 128):
        return f"tiles of {tile_s} slots, the kernel has 128"
    if q_BNHd.dtype != jnp.bfloat16:
        return f"dtype {q_BNHd.dtype}, the kernel takes bfloat16"
    if d % 16 or d > 256:
        return f"head width {d}, the kernel has multiples of 16 up to 256"
    if (S := k_BKSd.shape[2]) % 8 and S > (128 if d <= 128 else 64):
        return f"a cache of {S} slots, the kernel takes multiples of 8"
    return None


class Memory(NamedTuple):
    """References of the kernel: inputs, outputs, then buffers and barriers of a block of threads.

    q [BK, rows, d], k, v [B, K, S, d], own k, v [B, N, K, d], mask [1 or B, rows, N], lengths [B] -> out
    [splits + 1, BK, rows, d], top and total [splits + 1, BK, rows].
    """

    q: Ref
    k: Ref
    v: Ref
    new_k: Ref
    new_v: Ref
    mask: Ref
    lengths: Ref
    out: Ref
    top: Ref
    total: Ref
    q_buffer: Ref
    k_buffer: Ref
    v_buffer: Ref
    q_ready: Ref
    k_ready: Ref
    v_ready: Ref
    k_free: Ref
    v_free: Ref
    clean: Ref


State = tuple[jax.Array, jax.Array, jax.Array]  # output, top and total of a softmax


class _Block:
    """A block of threads: one share of the cache, or the tree's own keys, for some rows of a key head."""

    def __init__(self, launch: Launch, memory: Memory) -> None:
        self.o, self.p, self.m, self.scale, slots = launch.ops, launch.plan, memory, launch.scale, launch.slots
        p, m, heads, self.slots = self.p, memory, launch.heads, slots
        self.split, self.head, self.block = lax.axis_index("split"), lax.axis_index("head"), lax.axis_index("block")
        self.thread = lax.axis_index("wg")
        self.b, self.key_head = lax.div(self.head, jnp.int32(heads)), lax.rem(self.head, jnp.int32(heads))
        self.tile = jnp.int32(p.tile)
        self.own = self.split == p.splits  # the block of the tree's own keys
        self.length = jnp.clip(m.lengths[self.b], 0, slots)
        tiles = lax.div(self.length + self.tile - 1, self.tile)
        share = lax.div(tiles + p.splits - 1, jnp.int32(p.splits))
        self.first = jnp.where(self.own, 0, self.split * share)
        own_tiles = jnp.int32(m.new_k.shape[1] // p.tile)
        self.count = jnp.where(self.own, own_tiles, jnp.clip(tiles - self.first, 0, share))

    def slot(self, i: jax.Array) -> jax.Array:
        return lax.rem(i, jnp.int32(self.p.stages))

    def start(self, i: jax.Array) -> jax.Array:
        """The first slot of a tile; the last one ends with the cache, and overlaps the one before."""
        first = jnp.minimum((self.first + i) * self.tile, self.slots - self.tile)
        return pl.multiple_of(first, 8)  # copies are of whole tiles of 8

    def compute(self) -> None:
        p, m, o = self.p, self.m, self.o
        if p.warpgroups > 1:
            plgpu.set_max_registers(232, action="increase")
        row = (self.block * p.warpgroups + self.thread) * ROWS
        hopper.wait(m.q_ready)
        nothing = o.per_row(jnp.full((ROWS,), NEG, jnp.float32)), o.per_row(jnp.zeros((ROWS,), jnp.float32))
        zeros = o.tile(jnp.zeros((ROWS, m.q.shape[-1]), jnp.float32))
        add = functools.partial(self.add, row=row)
        out, top, total = lax.fori_loop(0, self.count, add, (zeros, *nothing))
        place = (self.split, self.head, pl.ds(row, ROWS))
        m.out[place] = out
        m.top[place] = top
        m.total[place] = total

    def add(self, i: jax.Array, state: State, row: jax.Array) -> State:
        """The keys of a tile join the softmax."""
        p, m, o = self.p, self.m, self.o
        out, top, total = state
        at, left = self.slot(i), self.length - self.start(i)  # slots of the tile that are valid, from its first on
        twice = (self.first + i) * self.tile - self.start(i)  # slots that the tile before has counted
        hopper.wait(m.k_ready.at[at])
        scores = o.dot(m.q_buffer.at[self.thread], m.k_buffer.at[at], transpose_b=True) * (self.scale * LOG2E)
        hopper.arrive(m.k_free.at[at])
        column = functools.partial(o.iota, (scores.shape[0], scores.shape[1]), 1)

        def tree(scores: jax.Array) -> jax.Array:
            which = lax.rem(self.b, jnp.int32(m.mask.shape[0]))
            where = (which, pl.ds(row, ROWS), pl.ds(i * self.tile, p.tile))
            seen = o.load(m.mask, where, plgpu.Layout.WGMMA, optimized=False)
            return jnp.where(seen.astype(jnp.int32) != 0, scores, NEG)

        def cached(scores: jax.Array) -> jax.Array:
            return jnp.where((column() >= twice) & (column() < left), scores, NEG)

        def partial(scores: jax.Array) -> jax.Array:
            return lax.cond((left < self.tile) | (twice > 0), cached, lambda scores: scores, scores)

        scores = lax.cond(self.own, tree, partial, scores)
        higher = jnp.maximum(top, scores.max(axis=1))
        base = jnp.where(higher < NEG / 2, 0.0, higher)  # of a row that has seen nothing, all weights are 0
        weights = jnp.exp2(scores - lax.broadcast_in_dim(base, scores.shape, [0]))
        shrink = jnp.exp2(top - base)
        total = total * shrink + weights.sum(axis=1)
        hopper.wait(m.v_ready.at[at])
        pl.when((left < self.tile) & jnp.logical_not(self.own))(functools.partial(self.clear, at, left))
        out = out * lax.broadcast_in_dim(shrink, out.shape, [0])
        out = o.dot(weights.astype(jnp.bfloat16), m.v_buffer.at[at], acc=out)
        hopper.arrive(m.v_free.at[at])
        return out, higher, total

    def clear(self, at: jax.Array, left: jax.Array) -> None:
        """Values past the length become 0: they hold anything, NaN too, and 0 * NaN would reach the output."""
        m, o = self.m, self.o

        @pl.when(self.thread == 0)
        def _() -> None:
            for piece in range(0, self.p.tile, 64):
                rows = m.v_buffer.at[at, pl.ds(piece, 64)]
                values = o.load(rows, (...,), plgpu.Layout.WGMMA)
                valid = o.iota((values.shape[0], values.shape[1]), 0) < left - piece
                rows[...] = jnp.where(valid, values, jnp.zeros_like(values))
            plgpu.commit_smem()
            hopper.arrive(m.clean)

        hopper.wait(m.clean)  # once at most: only the last tile of a row is partial

    def provide(self) -> None:
        """The warpgroup that fetches."""
        p, m, count, slot = self.p, self.m, self.count, self.slot
        if p.warpgroups > 1:
            plgpu.set_max_registers(40, action="decrease")
        for w in range(p.warpgroups):
            rows = pl.ds((self.block * p.warpgroups + w) * ROWS, ROWS)
            hopper.copy_in(m.q.at[self.head, rows], m.q_buffer.at[w], m.q_ready)
        keys = functools.partial(self.fetch, m.k, m.new_k, m.k_buffer, m.k_ready)
        values = functools.partial(self.fetch, m.v, m.new_v, m.v_buffer, m.v_ready)
        for i in range(p.stages):

            @pl.when(i < count)
            def _(i: int = i) -> None:
                keys(jnp.int32(i))
                values(jnp.int32(i))

        @pl.loop(p.stages, jnp.maximum(count, p.stages))
        def _(i: jax.Array) -> None:
            hopper.wait(m.k_free.at[slot(i)])
            keys(i)
            hopper.wait(m.v_free.at[slot(i)])
            values(i)

        @pl.loop(jnp.maximum(count - p.stages, 0), count)  # the interpreter wants every arrival seen
        def _(i: jax.Array) -> None:
            hopper.wait(m.k_free.at[slot(i)])
            hopper.wait(m.v_free.at[slot(i)])

    def fetch(self, old: Ref, new: Ref, buffer: Ref, ready: Ref, i: jax.Array) -> None:
        """A tile begins to arrive, of the cache or of the tree's own."""
        slot, tile = self.slot, self.p.tile

        @pl.when(self.own)
        def _() -> None:
            source = new.at[self.b, pl.ds(i * self.tile, tile), self.key_head]
            hopper.copy_in(source, buffer.at[slot(i)], ready.at[slot(i)])

        @pl.when(jnp.logical_not(self.own))
        def _() -> None:
            source = old.at[self.b, self.key_head, pl.ds(self.start(i), tile)]
            hopper.copy_in(source, buffer.at[slot(i)], ready.at[slot(i)])


def _kernel(launch: Launch, *refs: Ref) -> None:
    block, warpgroups = _Block(launch, Memory._make(refs)), launch.plan.warpgroups
    pl.when(block.thread < warpgroups)(block.compute)
    pl.when(block.thread == warpgroups)(block.provide)


def tree_decode(
    q_BNHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, problem: Filled, how: How = AUTO
) -> tuple[jax.Array, jax.Array]:
    """The same as `reference.reference`."""
    B, N, H, d = q_BNHd.shape
    K, G = k_BKSd.shape[1], H // k_BKSd.shape[1]
    p = plan(q_BNHd, k_BKSd, how)
    missing = max(0, p.tile - k_BKSd.shape[2])  # of a cache shorter than a tile
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else x for x in (k_BKSd, v_BKSd))
    rows, nodes = p.blocks * p.warpgroups * ROWS, -(-N // p.tile) * p.tile
    more = ((0, 0), (0, nodes - N))
    new_k, new_v = (jnp.pad(x, (*more, (0, 0), (0, 0))) for x in (problem.new_k, problem.new_v))
    q = q_BNHd.reshape(B, N, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B * K, G * N, d)
    q = jnp.pad(q, ((0, 0), (0, rows - G * N), (0, 0)))
    mask = jnp.pad(jnp.tile(problem.mask.astype(jnp.int8), (1, G, 1)), ((0, 0), (0, rows - G * N), more[1]))
    swizzle = next(bytes_ for bytes_ in (128, 64, 32) if 2 * d % bytes_ == 0)
    tiles = hopper.smem((p.stages, p.tile, d), q.dtype, swizzle)
    array: Any = jax.ShapeDtypeStruct
    per_row = array((p.splits + 1, B * K, rows), jnp.float32)
    ready = plgpu.Barrier(num_barriers=p.stages)
    free = plgpu.Barrier(num_arrivals=p.warpgroups, num_barriers=p.stages)
    out, top, total = plgpu.kernel(
        functools.partial(_kernel, Launch(hopper.Ops(bool(how.interpret)), p, problem.scale, k.shape[2], K)),
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
        interpret=hopper.params(bool(how.interpret)),
    )(
        q,
        k,
        v,
        new_k,
        new_v,
        mask,
        jnp.minimum(problem.lengths, k_BKSd.shape[2]).astype(jnp.int32),
    )
    highest = jnp.max(top, axis=0)
    weight = jnp.exp2(top - highest)
    sums = jnp.sum(weight * total, axis=0)
    merged = jnp.sum(weight[..., None] * out, axis=0) / jnp.where(sums > 0, sums, 1.0)[..., None]
    lse = jnp.where(sums > 0, (highest + jnp.log2(sums)) / LOG2E, -jnp.inf)
    merged = merged[:, : G * N].reshape(B, K, G, N, d).transpose(0, 3, 1, 2, 4).reshape(B, N, H, d)
    return merged.astype(q.dtype), lse[:, : G * N].reshape(B, K, G, N).transpose(0, 3, 1, 2).reshape(B, N, H)
