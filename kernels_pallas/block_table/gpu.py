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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.block_table.reference import from_units, in_units, turning
from kernels_pallas.common import GPUS, NEG, blocks

ROWS = 64  # the matrix unit multiplies for a warpgroup
ID_BITS, TURN_BITS, WHOLE = 17, 12, 1 << 29
COUNT, END, FIRST = 0, 1, 2  # of a list in memory: entries, slots of the row, the first word
LOG2E = math.log2(math.e)
WIDEST = 256


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


def plan(
    U: int, R: int, n: int, w: int, d: int, m: int, *, tile: int, stages: int, fill: int, limit: int
) -> Plan | None:
    """The largest tiles of at most `tile` keys that divide a block and fit `limit` bytes, or None if none does.

    One warpgroup takes half of that where it can, so that two blocks share a multiprocessor.
    """
    groups = 2 if R > ROWS and d <= 128 else 1
    rows = groups * ROWS if R > ROWS else R + -R % 8
    parts = max(1, min(n, fill // (U * -(-R // rows))))
    length = -(-(FIRST + n) // 32) * 32
    sizes = [x for x in range(min(tile, w) // 16 * 16, 0, -16) if w % x == 0]
    plans = [Plan(groups, rows, size, stages, parts, d, m, length) for size in sizes]
    half = [x for x in plans if x.memory <= limit // 2 and x.groups == 1 and x.tile >= 64]
    return next((x for x in (*half, *plans) if x.memory <= limit), None)


def choose(q: Any, n: int, h: int, w: int, q_block: int, m: int, chip: str | None, **given: Any) -> Plan | None:
    """The plan of a call on `chip`; `given` sizes that are not None win over its row."""
    B, T, H, d = q.shape
    name = chip if chip in GPUS else "h100"
    sizes = blocks("block_table", name, **given)
    sizes = {key: sizes[key] for key in ("tile", "stages", "fill")}
    return plan(B * h * -(-T // q_block), q_block * (H // h), n, w, d, m, **sizes, limit=GPUS[name].smem)


def refusal(
    q: Any, k: Any, lists: tuple[int, ...], w: int, q_block: int, angles: Any, chip: str | None, **given: Any
) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None. `lists`: the shape of `blocks`."""
    d, N = q.shape[-1], -(-k.shape[2] // w)
    if q.dtype != jnp.bfloat16:
        return f"{q.dtype}, the matrix unit multiplies bfloat16"
    if d > WIDEST or d % 16:
        return f"head width {d}, the kernel takes multiples of 16 up to {WIDEST}"
    if w % 16:
        return f"blocks of {w} keys, the kernel needs multiples of 16"
    if N > 1 << ID_BITS:
        return f"{N} key blocks, the kernel counts up to {1 << ID_BITS}"
    if angles is not None and angles.shape[0] > 1 << TURN_BITS:
        return f"{angles.shape[0]} turns, the kernel counts up to {1 << TURN_BITS}"
    m = 0 if angles is None else angles.shape[1]
    if m % 16:
        return f"turns of {m} pairs of channels, the kernel needs multiples of 16"
    if choose(q, lists[3], lists[1], w, q_block, m, chip, **given) is None:
        return f"{q_block} queries of width {d} and their tiles of keys exceed the shared memory of a block"
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


def _kernel(*refs: Any, ops: hopper.Ops, p: Plan, sizes: tuple[int, ...], scale: float, softcap: float | None) -> None:
    turned = 2 if p.m else 0
    words_ref, at_ref, k_ref, v_ref, k_short, v_short, q_ref = refs[:7]
    cos_ref, sin_ref = refs[7:9] if turned else (None, None)
    o_ref, lse_ref, listed, at, k, v, q, lse, have, full_k, full_v, free, ready = refs[7 + turned : 20 + turned]
    turned_q: Any = refs[20 + turned] if turned else None
    out = refs[-1] if p.parts > 1 else q
    K, h, Q, w, tiles = sizes
    group = lax.axis_index("group") if p.groups > 1 else jnp.int32(0)
    at_once, piece = jnp.int32(p.parts), lax.axis_index("block")
    part, piece = lax.rem(piece, at_once), lax.div(piece, at_once)
    tile, unit = lax.rem(piece, jnp.int32(tiles)), lax.div(piece, jnp.int32(tiles))
    b = lax.div(unit, jnp.int32(h * Q))
    cache = b * K + lax.div(lax.rem(lax.div(unit, jnp.int32(Q)), jnp.int32(h)) * K, jnp.int32(h))
    per_entry = w // p.tile

    def entries() -> Any:
        """Of this part, known once the list is here: every so many-th, so that parts are alike."""
        plgpu.barrier_wait(have)
        return lax.div(jnp.maximum(listed[COUNT] - part + (p.parts - 1), 0), at_once)

    def word(entry: Any) -> Any:
        return listed[FIRST + part + entry * at_once]

    def start(number: Any, step: Any) -> tuple[Any, Any]:
        """First slot wanted, and first slot read."""
        wanted = (number & ((1 << ID_BITS) - 1)) * w + lax.rem(step, jnp.int32(per_entry)) * p.tile
        return wanted, jnp.maximum(jnp.minimum(wanted, listed[END] - p.tile), 0)

    def fetch(step: Any) -> None:
        slot = lax.rem(step, jnp.int32(p.stages))
        _, first = start(word(lax.div(step, jnp.int32(per_entry))), step)
        short = listed[END] < p.tile
        for ref, copy, buffer, full in ((k_ref, k_short, k, full_k), (v_ref, v_short, v, full_v)):
            to = buffer.at[slot], full.at[slot]
            pl.when(short)(functools.partial(plgpu.copy_gmem_to_smem, copy.at[cache], *to))
            listed_keys = ref.at[cache, pl.ds(first, p.tile)]
            pl.when(jnp.logical_not(short))(functools.partial(plgpu.copy_gmem_to_smem, listed_keys, *to))

    def memory() -> None:
        """The warpgroup that fetches for the two others."""
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(words_ref.at[unit], listed, have)
        steps = entries() * per_entry

        def once_free(step: Any, carry: None) -> None:
            slot = free.at[lax.rem(step, jnp.int32(p.stages))]
            pl.when(step >= p.stages)(functools.partial(plgpu.barrier_wait, slot))
            pl.when(step < steps)(functools.partial(fetch, step))

        lax.fori_loop(0, steps + jnp.minimum(steps, p.stages), once_free, None)

    def compute() -> None:
        if p.groups > 1:
            plgpu.set_max_registers(232, action="increase")
        else:
            plgpu.copy_gmem_to_smem(words_ref.at[unit], listed, have)
        few = min(ROWS, p.rows)
        mine, arrived = pl.ds(tile * p.rows + group * ROWS, few), ready.at[group]
        numbers, to = pl.ds(ROWS * (tile * p.groups + group), ROWS), (group, pl.ds(0, few))
        plgpu.copy_gmem_to_smem(at_ref.at[b * Q + lax.rem(unit, jnp.int32(Q)), numbers], at.at[group], arrived)
        plgpu.copy_gmem_to_smem(q_ref.at[unit, mine], q.at[to], arrived)
        count = entries()
        steps = count * per_entry
        if p.groups == 1:
            for ahead in range(p.stages):
                pl.when(ahead < steps)(functools.partial(fetch, jnp.int32(ahead)))
        plgpu.barrier_wait(arrived)
        last = jnp.minimum(ops.load(at, (group,), plgpu.Layout.WGMMA.reduce(1)), listed[END] - 1)
        queries = (turned_q if p.m else q).at[group]

        by_column = plgpu.Layout.WGMMA.reduce(0)

        def turn(number: Any) -> None:
            """Turned queries of this entry, a few columns at a time for the sake of registers."""
            row, wide = (number >> ID_BITS) & ((1 << TURN_BITS) - 1), p.columns
            for column in range(0, p.d, wide):
                columns = pl.ds(column, wide)
                x = ops.load(q, (group, slice(None), columns), plgpu.Layout.WGMMA)
                if column < 2 * p.m:
                    partner = pl.ds(column + (p.m if column < p.m else -p.m), wide)
                    y = ops.load(q, (group, slice(None), partner), plgpu.Layout.WGMMA)
                    cos, sin = (
                        lax.broadcast_in_dim(ops.load(turns, (row, columns), by_column, optimized=False), x.shape, [1])
                        for turns in (cos_ref, sin_ref)
                    )
                    x = (x.astype(jnp.float32) * cos + y.astype(jnp.float32) * sin).astype(jnp.bfloat16)
                queries[:, columns] = x
            plgpu.commit_smem()

        def add(step: Any, carry: Any, number: Any) -> Any:
            acc, top, total = carry
            slot = lax.rem(step, jnp.int32(p.stages))
            plgpu.barrier_wait(full_k.at[slot])
            scores = ops.dot(queries, k.at[slot], transpose_b=True)
            if softcap is None:
                scores = scores * (scale * LOG2E)
            else:  # c tanh(x / c), by a power of 2 that is exact to the last bits
                powers = jnp.exp2(scores * (2 * scale * LOG2E / softcap))
                scores = softcap * LOG2E * (1.0 - 2.0 / (powers + 1.0))

            def masked(scores: Any) -> Any:
                wanted, first = start(number, step)
                slots = ops.iota(scores.shape, 1) + first
                seen = (slots <= lax.broadcast_in_dim(last, scores.shape, [0])) & (slots >= wanted)
                return jnp.where(seen, scores, -jnp.inf)

            scores = lax.cond((number & WHOLE) != 0, lambda x: x, masked, scores)
            higher = jnp.maximum(top, scores.max(axis=1))
            weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, scores.shape, [0]))
            shrink = jnp.exp2(top - higher)
            total = total * shrink + weights.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            plgpu.barrier_wait(full_v.at[slot])
            acc = ops.dot(weights.astype(jnp.bfloat16), v.at[slot], acc=acc)
            if p.groups > 1:
                plgpu.barrier_arrive(free.at[slot])
            else:
                plgpu.commit_smem()  # every warp is done with the slot
                pl.when(step + p.stages < steps)(functools.partial(fetch, step + p.stages))
            return acc, higher, total

        def entry(i: Any, carry: Any) -> Any:
            number = word(i)
            if p.m:
                turn(number)
            return lax.fori_loop(i * per_entry, (i + 1) * per_entry, functools.partial(add, number=number), carry)

        zeros = ops.tile(jnp.zeros((ROWS, p.d), jnp.float32))
        top, total = (ops.per_row(jnp.full((ROWS,), x, jnp.float32)) for x in (NEG, 0.0))
        acc, top, total = lax.fori_loop(0, count, lambda i, c: entry(i, c), (zeros, top, total))
        none = total == 0.0
        share = 1.0 / jnp.where(none, 1.0, total)
        out[group] = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(out.dtype)
        lse[group] = jnp.where(none, -jnp.inf, (top + jnp.log2(jnp.where(none, 1.0, total))) / LOG2E)
        plgpu.commit_smem()
        place = unit * at_once + part
        plgpu.copy_smem_to_gmem(out.at[to], o_ref.at[place, mine])
        plgpu.copy_smem_to_gmem(lse.at[group], lse_ref.at[place, numbers])
        plgpu.wait_smem_to_gmem(0)

    if p.groups == 1:
        compute()
    else:
        pl.when(group == p.groups)(memory)
        pl.when(group < p.groups)(compute)


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    blocks_BhQn: jax.Array,
    positions_BT: jax.Array,
    lengths_B: jax.Array,
    turn_BhQn: jax.Array | None = None,
    angles_Pm: jax.Array | None = None,
    *,
    block_size: int,
    q_block: int,
    scale: float,
    softcap: float | None,
    chip: str | None = None,
    tile: int | None = None,
    stages: int | None = None,
    fill: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The same as `reference.reference`, in bfloat16."""
    B, T, H, d = q_BTHd.shape
    K, S = k_BKSd.shape[1:3]
    h, Q, n = blocks_BhQn.shape[1:]
    U, w, bf16, f32 = B * h * Q, block_size, jnp.bfloat16, jnp.float32
    m = 0 if angles_Pm is None else angles_Pm.shape[1]
    p = choose(q_BTHd, n, h, w, q_block, m, chip, tile=tile, stages=stages, fill=fill)
    assert p is not None  # `refusal`
    q, at = in_units(q_BTHd, positions_BT, h, q_block)
    end = jnp.minimum(lengths_B, S).astype(jnp.int32)
    lists = words(blocks_BhQn, turn_BhQn, at, end, w, -(-S // w)).reshape(U, -1)
    lists = jnp.pad(lists, ((0, 0), (0, p.length - lists.shape[1])))
    R = q.shape[3]
    tiles = -(-R // p.rows)
    whole = tiles * p.groups * ROWS
    at = jnp.pad(at.reshape(B * Q, R), ((0, 0), (0, whole - R)), constant_values=-1)
    live = (jnp.arange(p.tile) < end[:, None])[:, None, :, None]
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, max(0, p.tile - S)), (0, 0))) for x in (k_BKSd, v_BKSd))
    short = [jnp.where(live, x[:, :, : p.tile], 0).reshape(B * K, p.tile, d) for x in (k, v)]
    queries = [jnp.pad(q.reshape(U, R, d), ((0, 0), (0, tiles * p.rows - R), (0, 0)))]
    if angles_Pm is not None:
        queries += turning(queries[0], angles_Pm)[0]
    bars = functools.partial(plgpu.Barrier, num_barriers=p.stages)
    rows = functools.partial(hopper.smem, (p.groups, ROWS, d), bf16, 2 * p.columns)
    # The matrix unit takes as many keys at a time as a tile of the values has columns.
    keys, values = (hopper.smem((p.stages, p.tile, d), bf16, 2 * x) for x in (p.columns, math.gcd(p.columns, p.tile)))
    partial = p.parts > 1
    out, lse = plgpu.kernel(
        functools.partial(
            _kernel, ops=hopper.Ops(interpret), p=p, sizes=(K, h, Q, w, tiles), scale=scale, softcap=softcap
        ),
        out_type=[
            jax.ShapeDtypeStruct((U * p.parts, tiles * p.rows, d), f32 if partial else bf16),
            jax.ShapeDtypeStruct((U * p.parts, whole), f32),
        ],
        grid=(U * tiles * p.parts,),
        grid_names=("block",),
        num_threads=p.groups + 1 if p.groups > 1 else None,
        thread_name="group" if p.groups > 1 else None,
        scratch_types=[
            plgpu.SMEM((p.length,), jnp.int32),
            plgpu.SMEM((p.groups, ROWS), jnp.int32),
            keys,
            values,
            rows(),
            plgpu.SMEM((p.groups, ROWS), f32),
            plgpu.Barrier(),
            bars(),
            bars(),
            bars(num_arrivals=p.groups),
            plgpu.Barrier(num_arrivals=2, num_barriers=p.groups),
            *([rows()] if m else []),
            *([hopper.smem((p.groups, ROWS, d), f32, min(hopper.SWIZZLE, 4 * p.columns))] if partial else []),
        ],
        # By lanes, as the layouts here are written; by warpgroups, the default of later versions, does not infer them.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=hopper.params(interpret),
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
