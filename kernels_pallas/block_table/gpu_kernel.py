"""The kernel of `block_table` for Hopper: a block of threads walks one part of a list. gpu.py says what that is."""

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
from kernels_pallas.block_table.gpu_plan import COUNT, END, FIRST, ID_BITS, ROWS, TURN_BITS, WHOLE, Plan
from kernels_pallas.common import NEG, Ref

LOG2E = math.log2(math.e)
State = tuple[jax.Array, jax.Array, jax.Array]  # output, top and total of a softmax


@dataclass(frozen=True)
class Launch:
    """What is static in the kernel. `sizes`: key heads, lists of a row, query blocks, slots of a block, pieces of a
    unit."""

    ops: hopper.Ops
    plan: Plan
    sizes: tuple[int, int, int, int, int]
    scale: float
    softcap: float | None


class Memory(NamedTuple):
    """References of the kernel: global memory, then shared memory and barriers of a block of threads.

    `cos`, `sin` and `turned_q` are there where queries turn. Elsewhere they are other references that nobody reads.
    """

    words: Ref
    at: Ref
    keys: Ref
    values: Ref
    short_keys: Ref
    short_values: Ref
    queries: Ref
    cos: Ref
    sin: Ref
    out: Ref
    lse: Ref
    listed: Ref
    own_at: Ref
    k: Ref
    v: Ref
    q: Ref
    own_lse: Ref
    have: Ref
    full_k: Ref
    full_v: Ref
    free: Ref
    ready: Ref
    turned_q: Ref
    own_out: Ref


def _named(refs: tuple[Ref, ...], p: Plan) -> Memory:
    """The references by name, from the order in which `gpu.attention` gives them."""
    turned = 2 if p.m else 0
    cos, sin = refs[7:9] if turned else refs[:2]
    rest = refs[7 + turned : 20 + turned]
    q = rest[6]
    every = (*refs[:7], cos, sin, *rest, refs[20 + turned] if turned else q, refs[-1] if p.parts > 1 else q)
    return Memory._make(every)


class _Block:
    """A block of threads: one part of the list of one piece of a unit."""

    def __init__(self, launch: Launch, memory: Memory) -> None:
        self.ops, self.p, self.m = launch.ops, launch.plan, memory
        self.scale, self.softcap = launch.scale, launch.softcap
        K, h, Q, w, pieces = launch.sizes
        self.w, self.per_entry = w, w // self.p.tile
        self.group = lax.axis_index("group") if self.p.groups > 1 else jnp.int32(0)
        self.at_once, piece = jnp.int32(self.p.parts), lax.axis_index("block")
        self.part, piece = lax.rem(piece, self.at_once), lax.div(piece, self.at_once)
        self.piece, self.unit = lax.rem(piece, jnp.int32(pieces)), lax.div(piece, jnp.int32(pieces))
        b = lax.div(self.unit, jnp.int32(h * Q))
        self.cache = b * K + lax.div(lax.rem(lax.div(self.unit, jnp.int32(Q)), jnp.int32(h)) * K, jnp.int32(h))
        self.row, self.Q = b, Q

    def entries(self) -> jax.Array:
        """Of this part, known once the list is here: every so many-th, so that parts are alike."""
        hopper.wait(self.m.have)
        return lax.div(jnp.maximum(self.m.listed[COUNT] - self.part + (self.p.parts - 1), 0), self.at_once)

    def word(self, entry: jax.Array) -> jax.Array:
        return self.m.listed[FIRST + self.part + entry * self.at_once]

    def start(self, number: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First slot wanted, and first slot read."""
        wanted = (number & ((1 << ID_BITS) - 1)) * self.w + lax.rem(step, jnp.int32(self.per_entry)) * self.p.tile
        return wanted, jnp.maximum(jnp.minimum(wanted, self.m.listed[END] - self.p.tile), 0)

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.p.stages))

    def fetch(self, step: jax.Array) -> None:
        """A tile of keys and one of values begin to arrive."""
        m, slot = self.m, self.slot(step)
        _, first = self.start(self.word(lax.div(step, jnp.int32(self.per_entry))), step)
        short = m.listed[END] < self.p.tile
        for ref, copy, buffer, full in (
            (m.keys, m.short_keys, m.k, m.full_k),
            (m.values, m.short_values, m.v, m.full_v),
        ):
            to = buffer.at[slot], full.at[slot]
            pl.when(short)(functools.partial(hopper.copy_in, copy.at[self.cache], *to))
            listed_keys = ref.at[self.cache, pl.ds(first, self.p.tile)]
            pl.when(jnp.logical_not(short))(functools.partial(hopper.copy_in, listed_keys, *to))

    def provide(self) -> None:
        """The warpgroup that fetches for the two others."""
        plgpu.set_max_registers(40, action="decrease")
        hopper.copy_in(self.m.words.at[self.unit], self.m.listed, self.m.have)
        steps = self.entries() * self.per_entry

        def once_free(step: jax.Array, carry: None) -> None:
            slot = self.m.free.at[self.slot(step)]
            pl.when(step >= self.p.stages)(functools.partial(hopper.wait, slot))
            pl.when(step < steps)(functools.partial(self.fetch, step))

        lax.fori_loop(0, steps + jnp.minimum(steps, self.p.stages), once_free, None)

    def compute(self) -> None:
        """A warpgroup that multiplies; alone, it fetches too."""
        p, m, group = self.p, self.m, self.group
        if p.groups > 1:
            plgpu.set_max_registers(232, action="increase")
        else:
            hopper.copy_in(m.words.at[self.unit], m.listed, m.have)
        few = min(ROWS, p.rows)
        mine, arrived = pl.ds(self.piece * p.rows + group * ROWS, few), m.ready.at[group]
        numbers, to = pl.ds(ROWS * (self.piece * p.groups + group), ROWS), (group, pl.ds(0, few))
        at = m.at.at[self.row * self.Q + lax.rem(self.unit, jnp.int32(self.Q)), numbers]
        hopper.copy_in(at, m.own_at.at[group], arrived)
        hopper.copy_in(m.queries.at[self.unit, mine], m.q.at[to], arrived)
        count = self.entries()
        steps = count * self.per_entry
        if p.groups == 1:
            for ahead in range(p.stages):
                pl.when(ahead < steps)(functools.partial(self.fetch, jnp.int32(ahead)))
        hopper.wait(arrived)
        last = jnp.minimum(self.ops.load(m.own_at, (group,), plgpu.Layout.WGMMA.reduce(1)), m.listed[END] - 1)
        acc, top, total = self.walk(count, last, steps)
        none = total == 0.0
        share = 1.0 / jnp.where(none, 1.0, total)
        m.own_out[group] = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(m.own_out.dtype)
        m.own_lse[group] = jnp.where(none, -jnp.inf, (top + jnp.log2(jnp.where(none, 1.0, total))) / LOG2E)
        plgpu.commit_smem()
        place = self.unit * self.at_once + self.part
        hopper.copy_out(m.own_out.at[to], m.out.at[place, mine])
        hopper.copy_out(m.own_lse.at[group], m.lse.at[place, numbers])
        plgpu.wait_smem_to_gmem(0)

    def walk(self, count: jax.Array, last: jax.Array, steps: jax.Array) -> State:
        """The softmax over all entries of this part. `last`: the last slot each query may see."""

        def entry(i: jax.Array, state: State) -> State:
            number = self.word(i)
            if self.p.m:
                self.turn(number)
            add = functools.partial(self.add, number=number, last=last, steps=steps)
            return lax.fori_loop(i * self.per_entry, (i + 1) * self.per_entry, add, state)

        zeros = self.ops.tile(jnp.zeros((ROWS, self.p.d), jnp.float32))
        top, total = (self.ops.per_row(jnp.full((ROWS,), x, jnp.float32)) for x in (NEG, 0.0))
        return lax.fori_loop(0, count, entry, (zeros, top, total))

    def turn(self, number: jax.Array) -> None:
        """Turned queries of an entry, a few columns at a time for the sake of registers."""
        p, m, group, load = self.p, self.m, self.group, self.ops.load
        by_column, tile = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA
        row, wide, queries = (number >> ID_BITS) & ((1 << TURN_BITS) - 1), p.columns, m.turned_q.at[group]
        for column in range(0, p.d, wide):
            columns = pl.ds(column, wide)
            x = load(m.q, (group, slice(None), columns), tile)
            if column < 2 * p.m:
                partner = pl.ds(column + (p.m if column < p.m else -p.m), wide)
                y = load(m.q, (group, slice(None), partner), tile)
                cos, sin = (
                    lax.broadcast_in_dim(load(turns, (row, columns), by_column, optimized=False), x.shape, [1])
                    for turns in (m.cos, m.sin)
                )
                x = (x.astype(jnp.float32) * cos + y.astype(jnp.float32) * sin).astype(jnp.bfloat16)
            queries[:, columns] = x
        plgpu.commit_smem()

    def add(self, step: jax.Array, state: State, number: jax.Array, last: jax.Array, steps: jax.Array) -> State:
        """The keys of a tile join the softmax."""
        p, m, ops = self.p, self.m, self.ops
        acc, top, total = state
        slot = self.slot(step)
        hopper.wait(m.full_k.at[slot])
        scores = ops.dot((m.turned_q if p.m else m.q).at[self.group], m.k.at[slot], transpose_b=True)
        if self.softcap is None:
            scores = scores * (self.scale * LOG2E)
        else:  # c tanh(x / c), by a power of 2 that is exact to the last bits
            powers = jnp.exp2(scores * (2 * self.scale * LOG2E / self.softcap))
            scores = self.softcap * LOG2E * (1.0 - 2.0 / (powers + 1.0))

        def masked(scores: jax.Array) -> jax.Array:
            wanted, first = self.start(number, step)
            slots = ops.iota((scores.shape[0], scores.shape[1]), 1) + first
            seen = (slots <= lax.broadcast_in_dim(last, scores.shape, [0])) & (slots >= wanted)
            return jnp.where(seen, scores, -jnp.inf)

        scores = lax.cond((number & WHOLE) != 0, lambda x: x, masked, scores)
        higher = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, scores.shape, [0]))
        shrink = jnp.exp2(top - higher)
        total = total * shrink + weights.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        hopper.wait(m.full_v.at[slot])
        acc = ops.dot(weights.astype(jnp.bfloat16), m.v.at[slot], acc=acc)
        if p.groups > 1:
            hopper.arrive(m.free.at[slot])
        else:
            plgpu.commit_smem()  # every warp is done with the slot
            pl.when(step + p.stages < steps)(functools.partial(self.fetch, step + p.stages))
        return acc, higher, total


def kernel(launch: Launch, *refs: Ref) -> None:
    block, groups = _Block(launch, _named(refs, launch.plan)), launch.plan.groups
    if groups == 1:
        block.compute()
    else:
        pl.when(block.group == groups)(block.provide)
        pl.when(block.group < groups)(block.compute)


def scratch(p: Plan) -> list[Any]:
    """Shared memory and barriers of a block of threads, in the order of `Memory`."""
    bars = functools.partial(plgpu.Barrier, num_barriers=p.stages)
    rows = functools.partial(hopper.smem, (p.groups, ROWS, p.d), jnp.bfloat16, 2 * p.columns)
    # The matrix unit takes as many keys at a time as a tile of the values has columns.
    keys, values = (
        hopper.smem((p.stages, p.tile, p.d), jnp.bfloat16, 2 * x) for x in (p.columns, math.gcd(p.columns, p.tile))
    )
    partial = hopper.smem((p.groups, ROWS, p.d), jnp.float32, min(hopper.SWIZZLE, 4 * p.columns))
    return [
        plgpu.SMEM((p.length,), jnp.int32),
        plgpu.SMEM((p.groups, ROWS), jnp.int32),
        keys,
        values,
        rows(),
        plgpu.SMEM((p.groups, ROWS), jnp.float32),
        plgpu.Barrier(),
        bars(),
        bars(),
        bars(num_arrivals=p.groups),
        plgpu.Barrier(num_arrivals=2, num_barriers=p.groups),
        *([rows()] if p.m else []),
        *([partial] if p.parts > 1 else []),
    ]
