"""Chosen tokens to their experts and back: on one device, or over the devices of a mesh.

Under a layout (`lm.sharding`) every device sorts its own tokens, in `jax.shard_map`: sorting is not something that the
compiler can cut. Where experts are cut, a row goes to the device that has its expert by one all-to-all and comes back
by another (GShard, arXiv 2006.16668). All-to-alls have one size, so C rows go to every device, whatever is in them: by
default as many as there can be, all assignments of the device or the capacity of the experts over there if that is
fewer; with ``train.mesh.exchange`` at most so many times an even share, and rows beyond that are dropped and counted.
Letters: n tokens of a device, k experts each, M = n k rows, E experts, e of them on a device, p devices that share the
experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm.ffn.base import Activated
from lm.ffn.moe.grouped import Weights, mixture
from lm.sharding import Layout, current

AXES = {
    **{name: ("experts", None, "mlp") for name in ("up", "gate")},
    **{name: ("experts", "mlp") for name in ("up_bias", "gate_bias")},
    "down": ("experts", "mlp", None),
}


def sorted_rows(expert_M: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Assignments by expert (E: nobody's, last): ``order[M]``, its inverse ``place[M]``, and ``sizes[E]``."""
    order_M = jnp.argsort(expert_M, stable=True)
    place_M = (
        jnp.zeros_like(order_M).at[order_M].set(jnp.arange(len(order_M), dtype=order_M.dtype), unique_indices=True)
    )
    return order_M, place_M, (expert_M[:, None] == jnp.arange(E)).sum(0).astype(jnp.int32)


def to_experts(
    x_BTD: jax.Array,
    experts_BTk: jax.Array,
    gates_BTk: jax.Array,
    weights: Weights,
    kind: Activated,
    implementation: str,
    per_row: int | None = None,
    in_all: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of every token's experts ``[B, T, D]``, and bool ``[B, T, k]``: what found a place on the way.

    `experts`: int32, E for an assignment that is nobody's. `weights`: see `lm.ffn.moe.grouped`, and ``down_bias``
    ``[E, D]`` of experts that have one. An expert is known to take at most `per_row` tokens of a row of the batch and
    `in_all` of all (None = any number).
    """
    if "down_bias" in weights:  # what it adds is known here: nobody needs to carry it
        bias_ED, rest = weights["down_bias"], {name: w for name, w in weights.items() if name != "down_bias"}
        y, fits = to_experts(x_BTD, experts_BTk, gates_BTk, rest, kind, implementation, per_row, in_all)
        gates = jnp.where(fits, gates_BTk, 0.0 * gates_BTk)[..., None]
        by_BTE = (gates * (experts_BTk[..., None] == jnp.arange(len(bias_ED)))).sum(2)
        return y + by_BTE.astype(y.dtype) @ bias_ED, fits
    found, E = _spread(x_BTD, len(weights["up"])), len(weights["up"])
    if found is None:
        x, experts, gates = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, experts_BTk, gates_BTk))
        return _here(x, experts, gates, weights, kind, implementation).reshape(x_BTD.shape), experts_BTk < E
    layout, mesh = found
    sizes, k = dict(mesh.shape), experts_BTk.shape[-1]
    batch, length, over, inner = (
        tuple(a for a in layout.axes_of(name) if sizes[a] > 1) for name in ("batch", "length", "experts", "mlp")
    )
    p = math.prod(sizes[a] for a in over)
    b, t = (n // layout.parts(name, sizes) for n, name in zip(x_BTD.shape[:2], ("batch", "length"), strict=True))
    bounds = [b * t * k]
    if per_row is not None:
        bounds.append(b * per_row * (E // p))
    if in_all is not None:
        bounds.append(in_all * (E // p))
    if layout.exchange is not None:
        bounds.append(math.ceil(layout.exchange * b * t * k / p))
    C = min(bounds)

    def local(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array]:
        x_nD, experts_nk, gates_nk = (a.reshape(-1, a.shape[-1]) for a in (x, experts, gates))
        if over:
            y, fits = _away(x_nD, experts_nk, gates_nk, weights, kind, implementation, over, p, C)
        else:
            y, fits = _here(x_nD, experts_nk, gates_nk, weights, kind, implementation), experts_nk < E
        if inner:
            y = jax.lax.psum(y, inner)  # every device has a part of an expert's channels
        return y.reshape(x.shape), fits.reshape(experts.shape)

    rows = P(batch, length)
    names: dict[str | None, Any] = {"experts": over or None, "mlp": inner or None}
    cut = {name: P(*(names.get(axis) for axis in AXES[name])) for name in weights}
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, cut),
        out_specs=(rows, rows),
        axis_names={*batch, *length, *over, *inner, *layout.axes_of("layers")},  # stages are mapped over
        check_vma=False,  # `mixture` has a gradient of its own, whose loops start from plain zeros
    )
    return run(x_BTD, experts_BTk, gates_BTk, weights)


def _spread(x_BTD: jax.Array, E: int) -> tuple[Layout, jax.sharding.Mesh] | None:
    """The layout, if it cuts tokens or experts in a way that `to_experts` serves; otherwise the compiler decides."""
    found = current()
    if found is None or found[1].size == 1:
        return None
    layout, mesh = found
    sizes: Mapping[str, int] = dict(mesh.shape)
    taken = {*layout.axes_of("batch"), *layout.axes_of("length")}
    if not any(sizes[a] > 1 for a in taken):
        return None
    named = zip((*x_BTD.shape[:2], E), ("batch", "length", "experts"), strict=True)
    whole = any(n % layout.parts(name, sizes) for n, name in named)
    apart = all(a in layout.axes_of("batch") for a in layout.axes_of("experts") if sizes[a] > 1)
    return None if whole or not apart else found


def _here(x: Any, experts_nk: Any, gates_nk: Any, weights: Weights, kind: Any, implementation: str) -> jax.Array:
    order, place, sizes = sorted_rows(experts_nk.reshape(-1), len(weights["up"]))
    return mixture(x, weights, gates_nk, order, place.reshape(experts_nk.shape), sizes, kind, implementation)


def _away(
    x: Any,
    experts_nk: Any,
    gates_nk: Any,
    weights: Weights,
    kind: Any,
    implementation: str,
    over: tuple[str, ...],
    p: int,
    C: int,
) -> tuple[jax.Array, jax.Array]:
    (n, k), e, D = experts_nk.shape, len(weights["up"]), x.shape[-1]
    M = n * k
    expert_M = experts_nk.reshape(-1)
    order, place, _ = sorted_rows(expert_M, e * p)
    to_M = expert_M // e  # p: nobody
    counts_p = (to_M[:, None] == jnp.arange(p)).sum(0).astype(jnp.int32)
    first_p = jnp.cumsum(counts_p) - counts_p
    full_pC = jnp.arange(C) < counts_p[:, None]
    rows_pC = order[jnp.minimum(first_p[:, None] + jnp.arange(C), M - 1)]
    sent = jnp.where(full_pC[..., None], x[rows_pC // k], jnp.zeros((), x.dtype))
    whose = jnp.where(full_pC, expert_M[rows_pC] % e, e)

    def swap(a: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(a, over, 0, 0, tiled=True)

    ones = jnp.ones((p * C, 1), gates_nk.dtype)
    out = _here(swap(sent).reshape(p * C, D), swap(whose).reshape(p * C, 1), ones, weights, kind, implementation)
    back = swap(out.reshape(p, C, D)).reshape(p * C, D)
    at_M = place - first_p[jnp.minimum(to_M, p - 1)]
    found_nk = ((to_M < p) & (at_M < C)).reshape(n, k)
    mine = back[jnp.clip(to_M * C + at_M, 0, p * C - 1).reshape(n, k)]
    gates = jnp.where(found_nk, gates_nk, 0.0 * gates_nk)  # NaN stays NaN
    return jnp.einsum("nkd,nk->nd", mine, gates.astype(mine.dtype)), found_nk
