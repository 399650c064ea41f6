"""Flash attention for TPU through Mosaic: forward, dQ (and slopes), dK and dV.

The grid runs over a table of tiles, prefetched into scalar memory: one int32 per tile with its query block, its key
block and four flags. Tiles the mask calls empty are not in it; a block of the output no tile writes has one entry
that only writes zeros (flag RUN unset). Queries lead in the forward and dQ tables, keys in the one of dK and dV, whose
grid also runs over the query heads of a key head, so that a key block stays in fast memory for all of them.

Fast memory of a step: double-buffered blocks of q, k, v (and dO), float32 accumulators, and three to five float32 tiles
``[block_q, block_k]`` (`tile_bytes`). Work: 4 d operations per pair of a visited tile forward, 10 d backward (14 d as
run, because each of its two kernels computes the logits again). arXiv 2205.14135, 2307.08691.
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

from kernels_pallas.common import NEG, Index, Interpret, Ref
from kernels_pallas.flash import per_head
from kernels_pallas.flash.problem import Mask, Rows
from kernels_pallas.flash.table import FIRST, LANES, LAST, RUN, WHOLE, k_block, q_block

FAR = 1e30  # log-sum-exp of a row that takes part in nothing: exp(s - FAR) is 0 for every s
KINDS = {"q": "q", "d_out": "q", "k": "k", "v": "k", "lse": "row", "shift": "row"}  # blocks of queries, keys, numbers


@dataclass(frozen=True)
class Spec:
    """What is static. `n_queries`, `n_keys`: before padding to whole blocks; `offset`: index of the first query."""

    mask: Mask
    block_q: int
    block_k: int
    n_queries: int
    n_keys: int
    offset: int
    scale: float
    softcap: float | None
    vmem: int | None
    interpret: Interpret


@dataclass(frozen=True)
class Tile:
    """A tile of the grid: its word in the table, its query head, and the axis that queries lie along."""

    word: jax.Array
    head: jax.Array
    at: int


def _along(row: jax.Array, axis: int) -> jax.Array:
    """A row ``[1, n]`` laid along `axis` of a tile."""
    return row if axis == 1 else jnp.expand_dims(row[0], 1)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """float32 product; float32 operands are multiplied as such, not rounded to bfloat16."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _logits(
    spec: Spec, tile: Tile, x: dict[str, Ref], rows: dict[str, Ref], whole: bool
) -> tuple[jax.Array, jax.Array | float, jax.Array | None]:
    """float32 logits of a tile, invisible pairs at `NEG`; d logit / d score; distances."""
    at, word = tile.at, tile.word
    q, k = x["q"][...], x["k"][...]
    s = (_dot(q, k, (1, 1)) if at == 0 else _dot(k, q, (1, 1))) * spec.scale
    row = {name: _along(ref[...], at if name[0] == "q" else 1 - at) for name, ref in rows.items()}
    distance = None
    if x["slopes"] is not None:
        distance = row["q_positions"] - row["k_positions"]
        s = s - x["slopes"][tile.head] * distance
    slope: jax.Array | float = 1.0
    if spec.softcap is not None:
        t = jnp.tanh(s / spec.softcap)
        s, slope = spec.softcap * t, 1.0 - t * t
    seen = None
    if not whole:
        if "q_index" in row:
            qi, ki = (jnp.broadcast_to(row[name], s.shape) for name in ("q_index", "k_index"))
            seen = spec.mask(qi, ki) & (qi >= 0) & (ki >= 0)
        else:
            qi = spec.offset + q_block(word) * spec.block_q + jax.lax.broadcasted_iota(jnp.int32, s.shape, at)
            ki = k_block(word) * spec.block_k + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1 - at)
            seen = spec.mask(qi, ki)
            if spec.n_keys % spec.block_k:
                seen &= ki < spec.n_keys
    if "q_segments" in row:
        same = row["q_segments"] == row["k_segments"]
        seen = same if seen is None else seen & same
    return s if seen is None else jnp.where(seen, s, NEG), slope, distance


def _bodies(word: jax.Array, body: Callable[[bool], None]) -> None:
    """`body(whole)` as the tile's flags say; tiles seen as a whole do not evaluate the mask."""
    for whole in (False, True):
        pl.when((word & (RUN | WHOLE)) == (RUN | (WHOLE if whole else 0)))(functools.partial(body, whole))


def _forward(spec: Spec, tiles: Ref, x: dict[str, Ref], rows: dict[str, Ref], *refs: Ref) -> None:
    """`refs`: output and log-sum-exp; scratch of the running maximum, of the denominator and of the output."""
    out, lse, top, total, acc = refs
    head, word = pl.program_id(1), tiles[pl.program_id(2)]

    @pl.when((word & FIRST) > 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        if x["sinks"] is None:
            top[...] = jnp.full_like(top, NEG / 2)
            total[...] = jnp.zeros_like(total)
        else:
            top[...] = jnp.full_like(top, x["sinks"][head])
            total[...] = jnp.ones_like(total)

    def body(whole: bool) -> None:
        s, _, _ = _logits(spec, Tile(word, head, 0), x, rows, whole)
        old = top[:, :1]
        new = jnp.maximum(old, s.max(1, keepdims=True))
        p, keep = jnp.exp(s - new), jnp.exp(old - new)
        total[...] = jnp.broadcast_to(keep * total[:, :1] + p.sum(1, keepdims=True), total.shape)
        top[...] = jnp.broadcast_to(new, top.shape)
        v = x["v"][...]
        acc[...] = acc[...] * keep + _dot(p.astype(v.dtype), v, (1, 0))

    _bodies(word, body)

    @pl.when((word & LAST) > 0)
    def _() -> None:
        empty = total[...] == 0
        safe = jnp.where(empty, 1.0, total[...])
        out[...] = (acc[...] / safe[:, :1]).astype(out.dtype)
        lse[...] = jnp.where(empty, NEG, top[...] + jnp.log(safe)).T[:1]


def _gradient_of_logits(
    spec: Spec, tile: Tile, x: dict[str, Ref], rows: dict[str, Ref], whole: bool
) -> tuple[jax.Array, jax.Array, jax.Array | float, jax.Array | None]:
    """Of a tile: probabilities, d loss / d logit, d logit / d score (before `scale`), distances."""
    at = tile.at
    s, bend, distance = _logits(spec, tile, x, rows, whole)
    p = jnp.exp(s - _along(x["lse"][...], at))
    v, d_out = x["v"][...], x["d_out"][...]
    dp = _dot(d_out, v, (1, 1)) if at == 0 else _dot(v, d_out, (1, 1))
    return p, p * (dp - _along(x["shift"][...], at)), bend, distance


def _backward_q(spec: Spec, tiles: Ref, x: dict[str, Ref], rows: dict[str, Ref], dq: Ref, *more: Ref) -> None:
    """`more`: results ``[1, block_q]`` for `per_head.sums`, the accumulator of dq, accumulators of the sums."""
    head, word = pl.program_id(1), tiles[pl.program_id(2)]
    sums, (acc, *acc_sums) = more[: len(more) // 2], more[len(more) // 2 :]

    @pl.when((word & FIRST) > 0)
    def _() -> None:
        for each in (acc, *acc_sums):
            each[...] = jnp.zeros_like(each)

    def body(whole: bool) -> None:
        p, error, bend, distance = _gradient_of_logits(spec, Tile(word, head, 0), x, rows, whole)
        k, ds = x["k"][...], error * bend
        acc[...] += _dot(ds.astype(k.dtype), k, (1, 0))
        terms = per_head.terms(p, error, bend, distance)
        for each, term in zip(acc_sums, terms, strict=False):  # none are kept without slopes and sinks
            each[...] += jnp.broadcast_to(term.sum(1, keepdims=True), each.shape)

    _bodies(word, body)

    @pl.when((word & LAST) > 0)
    def _() -> None:
        dq[...] = (acc[...] * spec.scale).astype(dq.dtype)
        for result, each in zip(sums, acc_sums, strict=True):
            result[...] = each[...].T[:1]


def _backward_kv(spec: Spec, groups: int, tiles: Ref, x: dict[str, Ref], rows: dict[str, Ref], *refs: Ref) -> None:
    """`refs`: dK and dV, and an accumulator of each."""
    dk, dv, acc_k, acc_v = refs
    word, group = tiles[pl.program_id(2)], pl.program_id(3)
    head = pl.program_id(1) * groups + group

    @pl.when(((word & FIRST) > 0) & (group == 0))
    def _() -> None:
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)

    def body(whole: bool) -> None:
        p, error, bend, _ = _gradient_of_logits(spec, Tile(word, head, 1), x, rows, whole)
        q, d_out = x["q"][...], x["d_out"][...]
        acc_k[...] += _dot((error * bend).astype(q.dtype), q, (1, 0))
        acc_v[...] += _dot(p.astype(d_out.dtype), d_out, (1, 0))

    _bodies(word, body)

    @pl.when(((word & LAST) > 0) & (group == groups - 1))
    def _() -> None:
        dk[...] = (acc_k[...] * spec.scale).astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)


Inputs = dict[str, jax.Array | None]
Out = tuple[jax.ShapeDtypeStruct, str] | None  # its shape and kind ("q", "k", "row")


@dataclass(frozen=True)
class Launch:
    """A kernel: its body, matrix products per tile, outputs and scratch.

    The grid is ``(batch, heads, tiles)``, or, `grouped`, ``(batch, key heads, tiles, query heads of one)``.
    """

    body: Callable[..., None]
    products: int
    outs: tuple[Out, ...]
    scratch: list[Any]
    grouped: bool = False


def _call(spec: Spec, launch: Launch, tiles: jax.Array, x: Inputs, rows: Rows) -> Any:
    """`pallas_call` of a kernel over the listed tiles."""
    grouped, outs, products = launch.grouped, launch.outs, launch.products
    assert x["q"] is not None and x["k"] is not None
    B, H, _, d = x["q"].shape
    groups = H // x["k"].shape[1]
    grid = (B, H // groups, len(tiles), groups) if grouped else (B, H, len(tiles))

    def q_head(h: Index, rest: tuple[Any, ...]) -> Index:
        return h * groups + rest[0] if grouped else h

    def of_q(b: Index, h: Index, n: Index, *rest: Any) -> tuple[Index, ...]:
        return b, q_head(h, rest), q_block(rest[-1][n]), 0

    def of_k(b: Index, h: Index, n: Index, *rest: Any) -> tuple[Index, ...]:
        # Not `//`: its lowering asks for the kind of the default device, which need not be the one compiled for.
        return b, h if grouped else jax.lax.div(h, jnp.int32(groups)), k_block(rest[-1][n]), 0

    def of_row(b: Index, h: Index, n: Index, *rest: Any) -> tuple[Index, ...]:
        return b, q_head(h, rest), 0, q_block(rest[-1][n])

    def block(kind: str, width: int) -> pl.BlockSpec:
        if kind == "row":
            return pl.BlockSpec((None, None, 1, spec.block_q), of_row)
        size, index = (spec.block_q, of_q) if kind == "q" else (spec.block_k, of_k)
        return pl.BlockSpec((None, None, size, width), index)

    def row_block(name: str) -> pl.BlockSpec:
        size, at = (spec.block_q, q_block) if name[0] == "q" else (spec.block_k, k_block)
        return pl.BlockSpec((None, 1, size), lambda b, h, n, *rest: (b, 0, at(rest[-1][n])))

    def spec_of(name: str, a: jax.Array | None) -> pl.BlockSpec | None:
        if a is None:
            return None
        if name not in KINDS:
            return pl.BlockSpec(memory_space=pltpu.SMEM)  # a number per head
        return block(KINDS[name], a.shape[-1])

    order: Any = ("parallel", "parallel", "arbitrary", "arbitrary")[: len(grid)]
    pairs = B * H * len(tiles) * spec.block_q * spec.block_k
    moved = B * H * len(tiles) * (spec.block_q + spec.block_k) * d * x["q"].dtype.itemsize
    return pl.pallas_call(
        functools.partial(launch.body, spec, *([groups] if grouped else [])),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[{name: spec_of(name, a) for name, a in x.items()}, {name: row_block(name) for name in rows}],
            out_specs=tuple(None if o is None else block(o[1], o[0].shape[-1]) for o in outs),
            scratch_shapes=launch.scratch,
        ),
        out_shape=tuple(None if o is None else o[0] for o in outs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=order,
            vmem_limit_bytes=spec.vmem,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * d * pairs, transcendentals=pairs, bytes_accessed=products * moved
        ),
        interpret=spec.interpret,
        name="flash" + launch.body.__name__,
    )(tiles, x, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    spec: Spec,
    q_BHTd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    slopes_H: jax.Array | None,
    sinks_H: jax.Array | None,
    rows: Rows,
    tables: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, H, T, d]`` and log-sum-exp float32 ``[B, H, T]``; T and S are whole blocks.

    `rows`: per-token data ``[B, 1, T]`` and ``[B, 1, S]``; `tables`: `pack` by queries and by keys. Differentiable in
    q, k, v, slopes and sinks through both results.
    """
    B, H, T, d = q_BHTd.shape
    x: Inputs = {"q": q_BHTd, "k": k_BKSd, "v": v_BKSd, "slopes": slopes_H, "sinks": sinks_H}
    launch = Launch(
        _forward,
        2,
        ((jax.ShapeDtypeStruct((B, H, T, d), v_BKSd.dtype), "q"), _row(B, H, T)),
        [*[pltpu.VMEM((spec.block_q, LANES), jnp.float32)] * 2, pltpu.VMEM((spec.block_q, d), jnp.float32)],
    )
    out, lse = _call(spec, launch, tables[0], x, rows)
    return out, lse[:, :, 0]


def _row(B: int, H: int, T: int) -> tuple[jax.ShapeDtypeStruct, str]:
    return jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32), "row"


def _attention_fwd(spec: Spec, *args: Any) -> Any:
    out, lse = attention(spec, *args)
    return (out, lse), (*args, out, lse)


def _attention_bwd(spec: Spec, saved: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> Any:
    q, k, v, slopes, sinks, rows, tables, out, lse = saved
    d_out, d_lse = cotangents
    B, H, T, d = q.shape
    # d logit = p * (dO . v - sum(dO * O) + dLSE)
    shift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    part = (lse > NEG / 2) & (jnp.arange(T) < spec.n_queries)
    safe = jnp.where(part, lse, FAR)
    x: Inputs = {
        "q": q,
        "k": k,
        "v": v,
        "d_out": d_out,
        "slopes": slopes,
        "lse": safe[:, :, None],
        "shift": shift[:, :, None],
    }
    names = per_head.sums(slopes, sinks)
    of_q = Launch(
        _backward_q,
        3,
        ((jax.ShapeDtypeStruct(q.shape, q.dtype), "q"), *[_row(B, H, T)] * len(names)),
        [pltpu.VMEM((spec.block_q, d), jnp.float32), *[pltpu.VMEM((spec.block_q, LANES), jnp.float32)] * len(names)],
    )
    dq, *of_rows = _call(spec, of_q, tables[0], x, rows)
    of_kv = Launch(
        _backward_kv,
        4,
        ((jax.ShapeDtypeStruct(k.shape, k.dtype), "k"), (jax.ShapeDtypeStruct(v.shape, v.dtype), "k")),
        [pltpu.VMEM((spec.block_k, d), jnp.float32)] * 2,
        grouped=True,
    )
    dk, dv = _call(spec, of_kv, tables[1], x, rows)
    sums = {name: row[:, :, 0] for name, row in zip(names, of_rows, strict=True)}
    heads = per_head.gradients(sums, sinks, safe, shift, d_lse)
    return dq, dk, dv, heads["slopes"], heads["sinks"], None, None


attention.defvjp(_attention_fwd, _attention_bwd)
