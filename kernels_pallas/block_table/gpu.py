"""Mosaic GPU kernel (Hopper) of attention to listed key blocks.

A *unit* is one query block of one row and head (or of the heads of one key head, if they share a list), as on a TPU. A
block of threads takes up to 64 rows of a unit, by one warpgroup that also fetches, two such blocks to a multiprocessor;
or 128 rows, by two warpgroups that compute and one that fetches for both. The list is cut down before (`words`: what is
empty, listed twice, past the row's length or later than every query is gone) and read from shared memory as scalars;
each listed block arrives by TMA in tiles of at most `tile` keys, `stages` tiles ahead of the products. Scores, weights
and sums stay in registers; turned queries pass through shared memory, once per entry. Blocks that every query sees
whole are computed without a mask. A tile that would reach past the row's length starts earlier instead, and its first
keys are masked, so that what lies past the length is never read; rows shorter than a tile are read from a copy of their
first tile with zeros there. Where units do not fill the chip (`fill` blocks of threads), the lists are cut into parts,
merged by log-sum-exp. Fewer than 64 queries of a unit, one token at a time say, still cost the matrix unit 64 rows:
there the fetch decides.

Registers of a computing thread, d 128: output 64, scores and weights 64 and 32. Shared memory (`Plan.memory`), d 128: 2
stages of 128 keys for 128 rows 166 KiB, 198 with turns; of 64 keys for 64 rows 86 KiB. Traffic: 2 w d values per listed
block and 128 (64) rows. Work: 4 R w d operations per listed block.
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
from kernels_pallas.block_table.problem import Filled
from kernels_pallas.block_table.reference import from_units, in_units, turning
from kernels_pallas.common import AUTO, GPUS, NEG, How, Ref, Shaped

ROWS = 64  # the matrix unit multiplies for a warpgroup
ID_BITS, TURN_BITS, WHOLE = 17, 12, 1 << 29
COUNT, END, FIRST = 0, 1, 2  # of a list in memory: entries, slots of the row, the first word
LOG2E = math.log2(math.e)
WIDEST = 256
State = tuple[jax.Array, jax.Array, jax.Array]  # output, top and total of a softmax


@dataclass(frozen=True)
class Plan:
    """How a call is cut: computing warpgroups and queries of a block of threads, keys of a tile, parts of a list."""

    groups: int
    rows: int
    tile: int
    stages: int
    parts: int
    d: int
    m: int  # pairs of channels that turn
    length: int  # int32 words of a list

    @property
    def columns(self) -> int:
        """Of a tile of shared memory: 64, 32 or 16, a divisor of the width and of the pairs."""
        return math.gcd(64, self.d, self.m)

    @property
    def memory(self) -> int:
        """Bytes of shared memory: tiles ahead, queries (plain and turned), partial outputs; 6 KiB for what is small."""
        queries = 2 * self.groups * ROWS * self.d * (2 if self.m else 1)
        partial = 4 * self.groups * ROWS * self.d if self.parts > 1 else 0
        return queries + partial + 4 * self.stages * self.tile * self.d + 4 * self.length + 6 * 1024


@dataclass(frozen=True)
class Lists:
    """Units, queries R of one, entries n of a list, slots w of a block, width d, pairs m that turn."""

    U: int
    R: int
    n: int
    w: int
    d: int
    m: int


def plan(lists: Lists, sizes: dict[str, int], limit: int) -> Plan | None:
    """The largest tiles of at most ``sizes["tile"]`` keys that divide a block and fit `limit` bytes, or None.

    One warpgroup takes half of that where it can, so that two blocks share a multiprocessor.
    """
    R, n, w, d = lists.R, lists.n, lists.w, lists.d
    groups = 2 if R > ROWS and d <= 128 else 1
    rows = groups * ROWS if R > ROWS else R + -R % 8
    parts = max(1, min(n, sizes["fill"] // (lists.U * -(-R // rows))))
    length = -(-(FIRST + n) // 32) * 32
    tiles = [x for x in range(min(sizes["tile"], w) // 16 * 16, 0, -16) if w % x == 0]
    plans = [Plan(groups, rows, tile, sizes["stages"], parts, d, lists.m, length) for tile in tiles]
    half = [x for x in plans if x.memory <= limit // 2 and x.groups == 1 and x.tile >= 64]
    return next((x for x in (*half, *plans) if x.memory <= limit), None)


def choose(q: Shaped, lists: tuple[int, ...], w: int, q_block: int, m: int, how: How) -> Plan | None:
    """The plan of a call. `lists`: the shape of the lists; `w`: slots of a block; `m`: pairs that turn."""
    B, T, H, d = q.shape
    h, n = lists[1], lists[3]
    of_call = Lists(B * h * -(-T // q_block), q_block * (H // h), n, w, d, m)
    return plan(of_call, how.blocks("block_table", how.hopper), GPUS[how.hopper].smem)


def refusal(q: Shaped, k: Shaped, lists: Shaped, problem: Filled, how: How) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None."""
    d, w, m = q.shape[-1], problem.block_size, problem.pairs
    N = -(-k.shape[2] // w)
    if q.dtype != jnp.bfloat16:
        return f"{q.dtype}, the matrix unit multiplies bfloat16"
    if d > WIDEST or d % 16:
        return f"head width {d}, the kernel takes multiples of 16 up to {WIDEST}"
    if w % 16:
        return f"blocks of {w} keys, the kernel needs multiples of 16"
    if N > 1 << ID_BITS:
        return f"{N} key blocks, the kernel counts up to {1 << ID_BITS}"
    if problem.turns > 1 << TURN_BITS:
        return f"{problem.turns} turns, the kernel counts up to {1 << TURN_BITS}"
    if m % 16:
        return f"turns of {m} pairs of channels, the kernel needs multiples of 16"
    if choose(q, lists.shape, w, problem.q_block, m, how) is None:
        return f"{problem.q_block} queries of width {d} and their tiles of keys exceed the shared memory of a block"
    return None


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
    """The references by name, from the order in which `attention` gives them."""
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


def _kernel(launch: Launch, *refs: Ref) -> None:
    block, groups = _Block(launch, _named(refs, launch.plan)), launch.plan.groups
    if groups == 1:
        block.compute()
    else:
        pl.when(block.group == groups)(block.provide)
        pl.when(block.group < groups)(block.compute)


def _scratch(p: Plan) -> list[Any]:
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
    assert p is not None  # `refusal`
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
        functools.partial(_kernel, launch),
        out_type=[
            jax.ShapeDtypeStruct((U * p.parts, tiles * p.rows, d), f32 if partial else bf16),
            jax.ShapeDtypeStruct((U * p.parts, whole), f32),
        ],
        grid=(U * tiles * p.parts,),
        grid_names=("block",),
        num_threads=p.groups + 1 if p.groups > 1 else None,
        thread_name="group" if p.groups > 1 else None,
        scratch_types=_scratch(p),
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
