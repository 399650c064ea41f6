"""Forward kernel of `flash` for Hopper: output and log-sum-exp.

Per block of threads: two warpgroups of 64 queries, and a third that fetches keys and values, 128 of them a tile (64
where heads are wider than 128), in two to four slots. Shared memory at width 128: 32 KiB of queries, where the output
is put together too, and 64 KiB per slot, three of them. Registers of a computing thread at width 128: 64 of output,
64 of logits, 32 of probabilities in bfloat16, out of 232. The two warpgroups take turns at the matrix unit: while one
multiplies, the other takes exponentials. Work: 4 d operations per pair of a visited tile. arXiv 2205.14135,
2407.08608.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.common import NEG, Ref
from kernels_pallas.flash.gpu_tile import (
    LOG2E,
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

State = tuple[jax.Array, jax.Array, jax.Array]  # output, top and total of a softmax


def shape(d: int, block_q: int, block_k: int) -> Shape:
    return fit(d, block_q, min(block_k, 64 if d > 128 else 128), 1)


def _forward(
    o: hopper.Ops, spec: Spec, place: Place, x: dict[str, Ref], outs: dict[str, Ref], scratch: dict[str, Ref]
) -> None:
    batch, head, block, warpgroup = place
    warpgroups, stream, stages = spec.shape.warpgroups, spec.shape.stream, spec.shape.stages
    d = x["q"].shape[-1]
    kv_head = lax.div(head, jnp.int32(x["q"].shape[2] // x["k"].shape[2]))
    full, empty = (scratch["k_full"], scratch["v_full"]), (scratch["k_empty"], scratch["v_empty"])

    def turn() -> None:
        """The other warpgroup may go on when both have been here."""
        if warpgroups > 1:
            hopper.arrive(scratch["turn"])
            hopper.wait(scratch["turn"])

    @pl.when(warpgroup < warpgroups)
    def _() -> None:
        registers(spec, True)
        q = scratch["q"].at[warpgroup]
        first = block * spec.shape.rows + warpgroup * ROWS
        mine = (batch, pl.ds(first, ROWS), head)
        hopper.copy_in(x["q"].at[mine], q, scratch["q_full"].at[warpgroup])
        held = {name: load(o, x[name], (batch,), first, ROWS, 0) for name in x if name.startswith("q_")}
        slope = x["slopes"][head] if spec.sloped else None
        top, total = (o.per_row(jnp.full((ROWS,), value, jnp.float32)) for value in (NEG / 2, 0.0))
        if "sinks" in x:
            top, total = (o.per_row(jnp.full((ROWS,), value, jnp.float32)) for value in (x["sinks"][head] * LOG2E, 1.0))
        acc = o.tile(jnp.zeros((ROWS, d), jnp.float32))
        hopper.wait(scratch["q_full"].at[warpgroup])
        pl.when(warpgroup == 1)(turn)  # half a step behind the first

        def step(n: jax.Array, tile: jax.Array, group: jax.Array, whole: bool, carry: State) -> State:
            acc, top, total = carry
            at = slot(n, stages)
            numbers = held | {
                name: load(o, x[name], (batch,), tile * stream, stream, 1) for name in x if name.startswith("k_")
            }
            hopper.wait(full[0].at[at])
            s = o.dot(q, scratch["k"].at[at], transpose_b=True, meanwhile=turn)
            hopper.arrive(empty[0].at[at])
            s, _, _ = logits(o, spec, s, numbers, (first, tile * stream), slope, whole, 0)
            new = jnp.maximum(top, s.max(axis=1) * spec.unit)
            p = jnp.exp2(s * spec.unit - along(new, s.shape, 0))
            keep = jnp.exp2(top - new)
            total = total * keep + p.sum(axis=1)
            acc, p = acc * along(keep, acc.shape, 0), p.astype(jnp.bfloat16)
            acc, total, new, p = lax.optimization_barrier((acc, total, new, p))
            if warpgroups > 1:
                hopper.arrive(scratch["turn"])
            hopper.wait(full[1].at[at])
            if warpgroups > 1:
                hopper.wait(scratch["turn"])
            acc = o.dot(p, scratch["v"].at[at], acc=acc)
            hopper.arrive(empty[1].at[at])
            return acc, new, total

        _, (acc, top, total) = walk(x, spec, 1, step, (acc, top, total))
        pl.when(warpgroup == 0)(turn)
        nothing = total == 0.0
        safe = jnp.where(nothing, 1.0, total)
        q[...] = (acc / along(safe, acc.shape, 0)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        hopper.copy_out(q, outs["out"].at[mine])
        lse = jnp.where(nothing, NEG, top * (1 / LOG2E) + jnp.log(safe))
        outs["lse"].at[batch, head, pl.ds(first, ROWS)][...] = lse
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == warpgroups)
    def _() -> None:
        registers(spec, False)

        def fetch(i: int, at: jax.Array, tile: jax.Array, group: jax.Array) -> None:
            name = "kv"[i]
            source = x[name].at[batch, pl.ds(tile * stream, stream), kv_head]
            hopper.copy_in(source, scratch[name].at[at], full[i].at[at])

        produce(x, spec, 1, empty, fetch)


def forward(spec: Spec, x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, H, T]`` of `x`: q, k, v, slopes, sinks, numbers, table."""
    B, T, H, d = x["q"].shape
    n, stages, stream = spec.shape.warpgroups, spec.shape.stages, spec.shape.stream
    scratch = {
        "q": operand((n, ROWS, d), jnp.bfloat16),
        "k": operand((stages, stream, d), jnp.bfloat16),
        "v": operand((stages, stream, d), jnp.bfloat16),
        "q_full": plgpu.Barrier(num_barriers=n),
        "k_full": plgpu.Barrier(num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "k_empty": plgpu.Barrier(num_arrivals=n, num_barriers=stages),
        "v_empty": plgpu.Barrier(num_arrivals=n, num_barriers=stages),
    }
    if n > 1:
        scratch["turn"] = plgpu.Barrier(num_arrivals=n)
    outs = {
        "out": jax.ShapeDtypeStruct((B, T, H, d), jnp.bfloat16),
        "lse": jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    }
    got = call(spec, _forward, x, outs, scratch, "q")
    return got["out"], got["lse"]
