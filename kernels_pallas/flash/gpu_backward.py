"""Backward kernels of `flash` for Hopper: dQ (and slopes); dK and dV.

Both compute logits and probabilities again from the log-sum-exp, in two warpgroups of 64 rows and one that fetches.
dQ holds 128 queries and their dO, and walks tiles of 64 keys and values; dK and dV hold 128 keys and values, and walk
tiles of 64 queries and dO of every query head of the key head. No atomics: results do not depend on the order of
blocks. Shared memory at width 128: 64 KiB held, where results are put together too, and 32 KiB per slot, four of
them. Registers of a computing thread at width 128: dQ 64 of sums, 64 of logits and their gradient; dK and dV 128 and
64, out of 232. Wider heads: 64 rows in one warpgroup, and dK and dV in a launch each, because their sums do not fit
together (the logits are then computed twice: 5 products for 4). Work: 6 d and 8 d operations per pair of a visited
tile. arXiv 2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.common import Ref
from kernels_pallas.flash import per_head
from kernels_pallas.flash.gpu_tile import (
    ROWS,
    Place,
    Shape,
    Spec,
    along,
    call,
    fit,
    load,
    logits,
    operand,
    produce,
    registers,
    slot,
    walk,
)

STREAM = 64
Inputs = dict[str, jax.Array]
Sums = dict[str, jax.Array]


def shape(d: int, rows: int) -> Shape:
    return fit(d, ROWS if d > 128 else rows, STREAM, 2)


def _fetching(
    spec: Spec,
    x: dict[str, Ref],
    groups: int,
    scratch: dict[str, Ref],
    names: str,
    where: Callable[[jax.Array, jax.Array], tuple[object, ...]],
) -> None:
    """The memory warpgroup: both operands of a tile arrive at one barrier. `where`: their place, of (tile, group)."""
    registers(spec, False)
    operands = {"kv": ("k", "v"), "qo": ("q", "d_out")}[names]

    def fetch(i: int, at: jax.Array, tile: jax.Array, group: jax.Array) -> None:
        for name in operands:
            source = x[name].at[where(tile, group)]
            hopper.copy_in(source, scratch["tile_" + name].at[at], scratch["full"].at[at])

    produce(x, spec, groups, (scratch["empty"],), fetch)


def _backward_q(
    o: hopper.Ops, spec: Spec, place: Place, x: dict[str, Ref], outs: dict[str, Ref], scratch: dict[str, Ref]
) -> None:
    batch, head, block, warpgroup = place
    d = x["q"].shape[-1]
    kv_head = lax.div(head, jnp.int32(x["q"].shape[2] // x["k"].shape[2]))

    @pl.when(warpgroup < spec.shape.warpgroups)
    def _() -> None:
        registers(spec, True)
        first = block * spec.shape.rows + warpgroup * ROWS
        mine, rows = (batch, pl.ds(first, ROWS), head), (batch, head, pl.ds(first, ROWS))
        q, d_out = scratch["q"].at[warpgroup], scratch["d_out"].at[warpgroup]
        for name, ref in (("q", q), ("d_out", d_out)):
            hopper.copy_in(x[name].at[mine], ref, scratch["held"].at[warpgroup])
        held = {name: load(o, x[name], (batch,), first, ROWS, 0) for name in x if name.startswith("q_")}
        lse, shift = (load(o, x[name], (batch, head), first, ROWS, 0) for name in ("lse", "shift"))
        slope = x["slopes"][head] if spec.sloped else None
        names = [name for name in outs if name != "dq"]
        sums = [o.tile(jnp.zeros((ROWS, d), jnp.float32)), *(o.per_row(jnp.zeros((ROWS,), jnp.float32)) for _ in names)]
        hopper.wait(scratch["held"].at[warpgroup])

        def step(
            n: jax.Array, tile: jax.Array, group: jax.Array, whole: bool, sums: list[jax.Array]
        ) -> list[jax.Array]:
            at = slot(n, spec.shape.stages)
            k, v = scratch["tile_k"].at[at], scratch["tile_v"].at[at]
            numbers = held | {
                name: load(o, x[name], (batch,), tile * STREAM, STREAM, 1) for name in x if name.startswith("k_")
            }
            hopper.wait(scratch["full"].at[at])

            def probabilities(s: jax.Array) -> Any:
                s, bend, distance = logits(o, spec, s, numbers, (first, tile * STREAM), slope, whole, 0)
                return jnp.exp2(s * spec.unit - along(lse, s.shape, 0)), bend, distance

            (p, bend, distance), dp = o.pair(q, k, d_out, v, probabilities)
            error = p * (dp - along(shift, p.shape, 0))
            ds = error if bend is None else error * bend
            terms = per_head.terms(p, error, bend, distance)
            more = [total + term.sum(axis=1) for total, term in zip(sums[1:], terms, strict=False)]
            (acc,) = o.add((sums[0], ds.astype(jnp.bfloat16), k))
            hopper.arrive(scratch["empty"].at[at])
            return [acc, *more]

        _, sums = walk(x, spec, 1, step, sums)
        q[...] = (sums[0] * spec.scale).astype(jnp.bfloat16)
        plgpu.commit_smem()
        hopper.copy_out(q, outs["dq"].at[mine])
        for name, total in zip(names, sums[1:], strict=True):
            outs[name].at[rows][...] = total
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == spec.shape.warpgroups)
    def _() -> None:
        _fetching(spec, x, 1, scratch, "kv", lambda tile, group: (batch, pl.ds(tile * STREAM, STREAM), kv_head))


def _backward_kv(
    o: hopper.Ops, spec: Spec, place: Place, x: dict[str, Ref], outs: dict[str, Ref], scratch: dict[str, Ref]
) -> None:
    batch, kv_head, block, warpgroup = place
    d = x["q"].shape[-1]
    groups = x["q"].shape[2] // x["k"].shape[2]

    @pl.when(warpgroup < spec.shape.warpgroups)
    def _() -> None:
        registers(spec, True)
        first = block * spec.shape.rows + warpgroup * ROWS
        mine = (batch, pl.ds(first, ROWS), kv_head)
        k, v = scratch["k"].at[warpgroup], scratch["v"].at[warpgroup]
        for name, ref in (("k", k), ("v", v)):
            hopper.copy_in(x[name].at[mine], ref, scratch["held"].at[warpgroup])
        held = {name: load(o, x[name], (batch,), first, ROWS, 0) for name in x if name.startswith("k_")}
        sums = {name: o.tile(jnp.zeros((ROWS, d), jnp.float32)) for name in outs}
        hopper.wait(scratch["held"].at[warpgroup])

        def step(n: jax.Array, tile: jax.Array, group: jax.Array, whole: bool, sums: Sums) -> Sums:
            at, head = slot(n, spec.shape.stages), kv_head * groups + group
            q, d_out = scratch["tile_q"].at[at], scratch["tile_d_out"].at[at]
            numbers = held | {
                name: load(o, x[name], (batch,), tile * STREAM, STREAM, 1) for name in x if name.startswith("q_")
            }
            lse = load(o, x["lse"], (batch, head), tile * STREAM, STREAM, 1)
            slope = x["slopes"][head] if spec.sloped else None
            hopper.wait(scratch["full"].at[at])

            def probabilities(s: jax.Array) -> Any:
                s, bend, _ = logits(o, spec, s, numbers, (tile * STREAM, first), slope, whole, 1)
                return jnp.exp2(s * spec.unit - along(lse, s.shape, 1)), bend

            def with_shift(s: jax.Array) -> Any:  # read when `lse` has left its registers
                return *probabilities(s), load(o, x["shift"], (batch, head), tile * STREAM, STREAM, 1)

            if "dk" not in outs:
                p, _ = probabilities(o.dot(k, q, transpose_b=True))
                sums = dict(zip(outs, o.add((sums["dv"], p.astype(jnp.bfloat16), d_out)), strict=True))
            else:
                (p, bend, shift), dp = o.pair(k, q, v, d_out, with_shift)

                def ds() -> jax.Array:
                    out = p * (dp - along(shift, p.shape, 1))
                    return (out if bend is None else out * bend).astype(jnp.bfloat16)

                terms: dict[str, Any] = {"dv": (p.astype(jnp.bfloat16), d_out), "dk": (ds, q)}
                added = o.add(*((sums[name], *terms[name]) for name in outs))
                sums = dict(zip(outs, added, strict=True))
            hopper.arrive(scratch["empty"].at[at])
            return sums

        _, sums = walk(x, spec, groups, step, sums)
        for name, ref, factor in (("dk", k, spec.scale), ("dv", v, 1.0)):
            if name in outs:
                ref[...] = (sums[name] * factor).astype(jnp.bfloat16)
        plgpu.commit_smem()
        for name, ref in (("dk", k), ("dv", v)):
            if name in outs:
                hopper.copy_out(ref, outs[name].at[mine])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == spec.shape.warpgroups)
    def _() -> None:
        where = lambda tile, group: (batch, pl.ds(tile * STREAM, STREAM), kv_head * groups + group)  # noqa: E731
        _fetching(spec, x, groups, scratch, "qo", where)


def _scratch(spec: Spec, d: int, held: tuple[str, str], streamed: tuple[str, str]) -> dict[str, Any]:
    n, stages = spec.shape.warpgroups, spec.shape.stages
    return {
        **{name: operand((n, ROWS, d), jnp.bfloat16) for name in held},
        **{"tile_" + name: operand((stages, STREAM, d), jnp.bfloat16) for name in streamed},
        "held": plgpu.Barrier(num_arrivals=2, num_barriers=n),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=n, num_barriers=stages),
    }


def backward_q(spec: Spec, x: Inputs, sums: tuple[str, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """dQ ``[B, T, H, d]``, and `per_head.sums` of every row float32 ``[B, H, T]``. `x`: as forward, with d_out, lse
    (times `LOG2E`) and shift ``[B, H, T]``, and the table by queries."""
    B, T, H, d = x["q"].shape
    outs = {"dq": jax.ShapeDtypeStruct((B, T, H, d), jnp.bfloat16)}
    outs |= dict.fromkeys(sums, jax.ShapeDtypeStruct((B, H, T), jnp.float32))
    got = call(spec, _backward_q, x, outs, _scratch(spec, d, ("q", "d_out"), ("k", "v")), "q")
    return got.pop("dq"), got


def backward_kv(spec: Spec, x: Inputs) -> tuple[jax.Array, jax.Array]:
    """dK and dV ``[B, S, K, d]``. `x`: as `backward_q`, with the table by keys."""
    d = x["q"].shape[-1]
    scratch = _scratch(spec, d, ("k", "v"), ("q", "d_out"))
    out = jax.ShapeDtypeStruct(x["k"].shape, jnp.bfloat16)
    got: dict[str, jax.Array] = {}
    for names in (("dv",), ("dk",)) if d > 128 else (("dv", "dk"),):
        got |= call(spec, _backward_kv, x, dict.fromkeys(names, out), scratch, "k")
    return got["dk"], got["dv"]
