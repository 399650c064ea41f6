"""Mosaic TPU kernel of attention to listed key blocks.

The lists lie in scalar memory before the grid starts: one int32 word per entry with the key block, its turn and two
flags. A *unit* is one query block of one row and head (or of the heads of one key head, if they share a list); the grid
is (units, entries / m), and the block specifications of keys and values read the words, so that a listed block is
fetched while the one before it is computed. A step holds m entries, because one block of 256 slots is fetched faster
than a step begins. Lists are sorted first. An entry that is listed twice, empty, past the row's length or later than
every query of the unit names the block before it: nothing is fetched or computed for it. Blocks that every query sees
whole are computed without a mask.

Fast memory of a step (`memory`): two buffers of m blocks of keys and values and of the unit's queries and output, the
accumulators, and float32 scores and weights [R, w]. Traffic: 2 w d values per listed block. Work: 4 R w d operations
per listed block; with few queries R the fetch decides. What is not listed costs nothing. Lists that exceed the scalar
memory given to a call are cut into several calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas.block_table.problem import Filled
from kernels_pallas.block_table.reference import from_units, in_units, turning
from kernels_pallas.common import AUTO, CHIPS, MIB, NEG, How, Index, Ref, Shaped, precision, vmem

LANES = 128
ID_BITS, TURN_BITS = 17, 12
RUN, WHOLE = 1 << 30, 1 << 29
LIMIT = 12 * MIB  # of fast memory for a step with one entry


def rows(H: int, h: int, q_block: int) -> int:
    """Queries of a unit."""
    return q_block * (H // h)


def memory(entries: int, w: int, R: int, d: int, dtype: DTypeLike, turns: int = 0) -> int:
    """Bytes of fast memory of one step."""
    size, wide = jnp.dtype(dtype).itemsize, -(-d // LANES) * LANES
    R = -(-R // 16) * 16
    held = 2 * (2 * entries * w + (3 if turns else 2) * R) * wide * size + 2 * 2 * 4 * 8 * max(R, LANES)
    scratch = 4 * R * (wide + 2 * LANES) + 2 * 2 * 4 * turns * wide
    return held + scratch + 4 * R * (2 * w + 2 * wide)


def choose(n: int, w: int, R: int, d: int, dtype: DTypeLike, entries: int, mib: int, turns: int = 0) -> int:
    """Entries of a step: `entries`, fewer if there are no more or if they would take more than `mib`."""
    out = min(entries, n)
    while out > 1 and memory(out, w, R, d, dtype, turns) > mib * MIB:
        out -= 1
    return out


def refusal(q: Shaped, k: Shaped, lists: Shaped, problem: Filled, tiled: bool) -> str | None:
    """Why the kernel cannot serve a well-formed call, or None. `tiled`: on a chip, whose memory lies in tiles."""
    (_, _, H, d), S = q.shape, k.shape[2]
    tile, turns, w = 32 // q.dtype.itemsize, problem.turns, problem.block_size
    if tiled and w % tile:
        return f"blocks of {w} keys, the kernel needs multiples of {tile} in {q.dtype}"
    if d > 256:
        return f"head width {d}, the kernel holds up to 256"
    if -(-S // w) > 1 << ID_BITS:
        return f"{-(-S // w)} key blocks, the kernel counts up to {1 << ID_BITS}"
    if turns > 1 << TURN_BITS:
        return f"{turns} turns, the kernel counts up to {1 << TURN_BITS}"
    need = memory(1, w, rows(H, lists.shape[1], problem.q_block), d, q.dtype, turns)
    if need > LIMIT:
        return f"a step takes {need / MIB:.1f} MiB of fast memory, the kernel may take {LIMIT // MIB}"
    return None


def words(ids: jax.Array, turn: jax.Array | None, at_BQR: jax.Array, end_B: jax.Array, w: int, N: int) -> jax.Array:
    """The lists ``[B, h, Q, n]`` as int32 words, ascending: key block, turn, flags. `end_B`: slots of a row."""
    end, last, first = (x[:, None, :, None] for x in (end_B[:, None], at_BQR.max(-1), at_BQR.min(-1)))
    use = (ids >= 0) & (ids < N) & (ids * w < end) & (ids * w <= last)
    turn = jnp.zeros_like(ids) if turn is None else jnp.clip(turn, 0, (1 << TURN_BITS) - 1)
    ids, turn = jax.lax.sort((jnp.where(use, ids, N), turn), num_keys=1, is_stable=True)
    again = jnp.pad(ids[..., 1:] == ids[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    run = (ids < N) & ~again
    ids = jax.lax.cummax(jnp.where(ids < N, ids, 0), axis=3)  # the block before: nothing new is fetched
    whole = ((ids + 1) * w <= end) & ((ids + 1) * w - 1 <= first)
    return ids | (turn << ID_BITS) | jnp.where(whole, WHOLE, 0) | jnp.where(run, RUN, 0)


def _key_block(word: jax.Array) -> jax.Array:
    return word & ((1 << ID_BITS) - 1)


@dataclass(frozen=True)
class Plan:
    """What is static of a call: `entries` of a grid step, `n` of a list, `w` slots of a block; the logits."""

    entries: int
    n: int
    w: int
    scale: float
    softcap: float | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Units:
    """Per unit: its words ``[U, n]``, `where` ``[U, 3]`` (row of the cache, end, row of the positions), and queries.

    Queries ``[U, R, d]``, as they are and with the halves of their channels swapped, for turns.
    """

    words: jax.Array
    where: jax.Array
    queries: jax.Array
    swapped: jax.Array | None


def _kernel(plan: Plan, turned: bool, words_ref: Ref, where_ref: Ref, *refs: Ref) -> None:
    entries, n, w, scale, softcap = plan.entries, plan.n, plan.w, plan.scale, plan.softcap
    q_ref, at_ref = refs[:2]
    listed = refs[5 if turned else 2 :]
    keys, values, (o_ref, lse_ref, out, top, total) = (
        listed[:entries],
        listed[entries : 2 * entries],
        listed[2 * entries :],
    )
    unit, step = pl.program_id(0), pl.program_id(1)
    dot = functools.partial(jax.lax.dot_general, precision=precision(q_ref.dtype), preferred_element_type=jnp.float32)

    @pl.when(step == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, NEG)

    def add(word: jax.Array, k_ref: Ref, v_ref: Ref, whole: bool) -> None:
        q, v = q_ref[...], v_ref[...]
        if turned:
            row = pl.ds((word >> ID_BITS) & ((1 << TURN_BITS) - 1), 1)
            swapped_ref, *turns = refs[2:5]
            both = (x.astype(jnp.float32) for x in (q, swapped_ref[...]))
            q = jnp.asarray(sum(x * turn[row, :] for x, turn in zip(both, turns, strict=True))).astype(q.dtype)
        scores = scale * dot(q, k_ref[...], (((1,), (1,)), ((), ())))
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if not whole:
            start, end = _key_block(word) * w, where_ref[3 * unit + 1]
            slot = start + jax.lax.broadcasted_iota(jnp.int32, (1, w), 1)
            seen = (slot <= jnp.expand_dims(at_ref[...][0], 1)) & (slot < end)
            scores = jnp.where(seen, scores, NEG)
            # Slots past the end hold anything, NaN too, and 0 * NaN would reach the output.
            down = start + jax.lax.broadcasted_iota(jnp.int32, (w, 1), 0)
            v = jnp.where(down < end, v.astype(jnp.float32), 0.0).astype(v.dtype)
        before = top[:, :1]
        higher = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - higher)
        if not whole:
            weights = jnp.where(seen, weights, 0.0)
        shrink = jnp.exp(before - higher)
        out[...] = out[...] * shrink + dot(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        top[...] = jnp.broadcast_to(higher, top.shape)

    for entry in range(entries):
        word = words_ref[unit * n + step * entries + entry]
        for whole in (True, False):
            flags = (RUN | WHOLE) if whole else RUN

            @pl.when((word & (RUN | WHOLE)) == flags)
            def _(word: jax.Array = word, entry: int = entry, whole: bool = whole) -> None:
                add(word, keys[entry], values[entry], whole)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        sums = total[...]
        o_ref[...] = (out[...] / jnp.where(sums > 0, sums, 1.0)[:, :1]).astype(o_ref.dtype)
        lse_ref[...] = jnp.where(sums > 0, top[...] + jnp.log(sums), -jnp.inf).T[:1]


def _call(
    plan: Plan, how: How, units: Units, at: jax.Array, turns: tuple[jax.Array, ...], kv: tuple[jax.Array, jax.Array]
) -> Any:
    """Output ``[U, R, d]`` and log-sum-exp ``[U, 1, R]`` of a few units.

    `at`: positions ``[B Q, 1, R]``; `turns`: cosines and sines, or nothing; `kv`: keys and values ``[B K, S, d]``.
    """
    U, R, d = units.queries.shape
    n, entries, w = plan.n, plan.entries, plan.w

    def of_unit(u: Index, j: Index, words: Ref, where: Ref) -> tuple[Index, ...]:
        return u, 0, 0

    def of_at(u: Index, j: Index, words: Ref, where: Ref) -> tuple[Index, ...]:
        return where[3 * u + 2], 0, 0

    def of_key(entry: int) -> Callable[..., tuple[Index, ...]]:
        return lambda u, j, words, where: (where[3 * u], _key_block(words[u * n + j * entries + entry]), 0)

    queries = pl.BlockSpec((None, R, d), of_unit)
    whole = [pl.BlockSpec(x.shape, lambda u, j, words, where: (0, 0)) for x in turns]
    listed = [pl.BlockSpec((None, w, d), of_key(entry)) for entry in range(entries)]
    q = units.queries
    size = q.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, plan, bool(turns)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(U, n // entries),
            in_specs=[
                queries,
                pl.BlockSpec((None, 1, R), of_at),
                *([queries, *whole] if turns else []),
                *listed,
                *listed,
            ],
            out_specs=[queries, pl.BlockSpec((None, 1, R), of_unit)],
            scratch_shapes=[pltpu.VMEM((R, d), jnp.float32), *[pltpu.VMEM((R, LANES), jnp.float32)] * 2],
        ),
        out_shape=[jax.ShapeDtypeStruct((U, R, d), q.dtype), jax.ShapeDtypeStruct((U, 1, R), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem(how.chip)
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * U * R * n * w * d, transcendentals=U * R * n * w, bytes_accessed=2 * U * (n * w + R) * d * size
        ),
        interpret=how.interpret,
        name="block_table",
    )(
        units.words.reshape(-1),
        units.where.reshape(-1),
        q,
        at,
        *([units.swapped, *turns] if turns else []),
        *[kv[0]] * entries,
        *[kv[1]] * entries,
    )


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    blocks_BhQn: jax.Array,
    problem: Filled,
    how: How = AUTO,
) -> tuple[jax.Array, jax.Array]:
    """The same as `reference.reference`."""
    B, T, H, d = q_BTHd.shape
    K, S = k_BKSd.shape[1:3]
    h, Q, n = blocks_BhQn.shape[1:]
    w, q_block = problem.block_size, problem.q_block
    q, at = in_units(q_BTHd, problem.positions, h, q_block)
    R, end = q.shape[3], jnp.minimum(problem.lengths, S)
    words_BhQn = words(blocks_BhQn, problem.turn, at, end, w, -(-S // w))
    turns, swapped = turning(q, problem.angles) if problem.angles is not None else ((), None)
    row = how.blocks("block_table", how.chip if how.chip in CHIPS else None)
    m = choose(n, w, R, d, q.dtype, row["entries"], row["mib"], problem.turns)
    rest = -n % m
    words_BhQn = jnp.concatenate([words_BhQn, jnp.repeat(words_BhQn[..., -1:] & ~RUN, rest, axis=-1)], axis=-1)
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, max(0, w - S)), (0, 0))) for x in (k_BKSd, v_BKSd))  # a block fits
    k, v = (x.reshape(B * K, -1, d) for x in (k, v))
    U = B * h * Q
    b, head, i = (x.reshape(-1) for x in jnp.indices((B, h, Q), dtype=jnp.int32))
    where = jnp.stack([b * K + head * K // h, end[b].astype(jnp.int32), b * Q + i], axis=1)
    plan = Plan(m, n + rest, w, problem.scale, problem.softcap)
    at = at.reshape(B * Q, 1, R)
    units = Units(
        words_BhQn.reshape(U, -1),
        where,
        q.reshape(U, R, d),
        swapped if swapped is None else swapped.reshape(U, R, d),
    )
    few = max(1, row["kib"] * 256 // (n + rest + 3))  # units whose words fit

    def some(units: Units) -> Any:
        return _call(plan, how, units, at, turns, (k, v))

    if U <= few:
        out, lse = some(units)
    else:
        pieces = -(-U // few)
        few = -(-U // pieces)

        def cut(x: jax.Array) -> jax.Array:  # units past the last repeat it
            return jnp.pad(x, [(0, pieces * few - U)] + [(0, 0)] * (x.ndim - 1), mode="edge").reshape(
                pieces, few, *x.shape[1:]
            )

        out, lse = jax.lax.map(some, jax.tree.map(cut, units))
        out, lse = (x.reshape(pieces * few, *x.shape[2:])[:U] for x in (out, lse))
    return (
        from_units(out.reshape(B, h, Q, R, d), T, H, q_block),
        from_units(lse.reshape(B, h, Q, R), T, H, q_block),
    )
