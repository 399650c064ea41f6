"""How a stack of equal layers is run: one after the other, or in stages over the mesh axis ``stage`` (GPipe).

The rows of a batch are cut into M microbatches (GPipe, arXiv 1811.06965); stage s holds layers ``s L / S`` and on. In
tick t stage s works on microbatch ``t - s``: an array with one microbatch per stage is shifted by one stage, the next
microbatch enters at the front, and all stages run at once as one mapped function whose mapped axis lies over the
devices, so that the compiler makes the shift a permute (GSPMD, arXiv 2105.04663, section 3.3). Of ``M + S - 1`` ticks
every stage is idle in S - 1, a share ``(S - 1) / (M + S - 1)`` (`bubble`).

Microbatches wait on the devices of all stages, ``K = ceil(M / S)`` on each: a belt ``[S, K, …]`` over the stages. Stage
s holds the microbatches from ``s K`` on; every K-th tick a place moves down by one stage, so that stage 0 finds the one
it needs, and what leaves the last stage takes the place that came free. After ``M + S - 1`` ticks results lie where
their rows came from. Outside the stages rows are cut over them as over ``data`` if S divides M
(`Layout.layout_around_stages`): embeddings and loss are computed once, and no device holds the batch of its replica.

The schedule is GPipe's and not 1F1B (arXiv 2104.04473) because the backward pass is the derivative of this loop, and
so its mirror image: it starts when the last microbatch is through. The bubble is the same. What a stage holds is the
inputs of its layers under ``model.remat``, of ``M + S - 1`` microbatches where 1F1B holds S at most; the rule
``stream`` (`lm.sharding.layout`) divides them by ``tensor``, which makes room for as many microbatches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import UserError, divisors
from lm.sharding.layout import constrain, current, parts, using

Body = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]
Join = Callable[[Any], Any]


def bubble(stages: int, microbatches: int) -> float:
    """The share of a step in which a stage has nothing to do."""
    return (stages - 1) / (microbatches + stages - 1)


def check(layers: Sequence[Any], stages: int, rows: int, row_parts: int, microbatches: int, scanned: bool) -> None:
    """Raises `UserError` for layers (their configurations) that are no `stages` equal stages, and for `rows` on
    `row_parts` groups of devices that are no equal microbatches."""
    if stages == 1:
        if microbatches > 1:
            raise UserError(f"train.mesh.microbatches: {microbatches} without stages; valid: None, or a stage above 1")
        return
    if not scanned:
        raise UserError(f"train.mesh.stage: {stages} stages need stacked layers; valid: model.scan_layers=True")
    for i, layer in enumerate(layers):
        if layer != layers[0]:
            names = (f.name for f in dataclasses.fields(layer))
            name = next(n for n in names if getattr(layer, n) != getattr(layers[0], n))
            raise UserError(
                f"train.mesh.stage: layer {i} differs from layer 0 in model.{name}, and stages are equal layers; "
                "valid: equal layers, or train.mesh.stage=1"
            )
    if len(layers) % stages:
        raise UserError(
            f"train.mesh.stage: {stages} does not divide model.n_layers = {len(layers)}; valid: {divisors(len(layers))}"
        )
    if rows % (microbatches * row_parts):
        each = rows // row_parts
        raise UserError(
            f"train.mesh.microbatches: {microbatches} does not divide the {each} rows of a device (train.batch over "
            f"train.accumulate and {row_parts} devices); valid: {divisors(each)}"
        )


def run_stack(body: Body, x_BTD: jax.Array, rows: Any, stack: Any, join: Join) -> tuple[jax.Array, Any]:
    """``body(x, rows, of_layer) -> (x, said)`` for every layer of `stack` (leading axis L): the last x, and what the
    layers said, stacked.

    `rows`: a tree of arrays ``[B, T, …]`` that belong to the rows of x. In stages where the current layout cuts the
    layers: there `join` makes ``[L, …]`` of what layers said of each microbatch, ``[M, L, …]``, and random keys in
    `stack` give every microbatch numbers of its own. Rows that are not M equal parts (one row, to see what shapes are)
    pass layer by layer.
    """
    S, B, found = parts("layers"), x_BTD.shape[0], current()
    M = 1 if found is None else found[0].in_flight(S)
    if S == 1 or B % M or found is None:
        return jax.lax.scan(lambda x, of_layer: body(x, rows, of_layer), x_BTD, stack)
    layout, mesh = found[0].layout_in_stage(), found[1]
    over = tuple(a for a in layout.axes_of("layers") if mesh.shape[a] > 1)
    b, K, P = B // M, -(-M // S), layout.parts("batch", dict(mesh.shape))
    P = 1 if b % P else P

    def split(a: jax.Array) -> jax.Array:
        """``[B, …]`` -> ``[M, b, …]``: a device that holds rows has its share of every microbatch."""
        return jnp.moveaxis(a.reshape(P, M, b // P, *a.shape[1:]), 1, 0).reshape(M, b, *a.shape[1:])

    def whole(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(M, P, b // P, *a.shape[2:]), 0, 1).reshape(B, *a.shape[2:])

    def at(s: int) -> jax.Array:
        return (jnp.arange(S) == s).reshape(S, *(1,) * x_BTD.ndim)

    def stage(layers: Any, x: jax.Array, rows: Any) -> tuple[jax.Array, Any]:
        return jax.lax.scan(lambda x, of_layer: body(x, rows, of_layer), x, layers)

    def own(p: Any, t: jax.Array) -> Any:
        """Keys of a tick: within a stage, ticks are microbatches."""
        if M == 1 or not jnp.issubdtype(p.dtype, jax.dtypes.prng_key):
            return p
        return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, t)))(p)

    by_stage = jax.tree.map(lambda p: p.reshape(S, p.shape[0] // S, *p.shape[1:]), stack)
    rows_M = jax.tree.map(split, rows)

    def tick(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[Any, Any]:
        belt, held = carry
        slot = jnp.mod(t, K)
        passing = jax.lax.dynamic_index_in_dim(belt, slot, 1, keepdims=False)
        x = _placed(jnp.where(at(0), passing, jnp.roll(held, 1, 0)), "layers")
        own_rows = jax.tree.map(lambda a: a[jnp.clip(t - jnp.arange(S), 0, M - 1)], rows_M)
        x, said = jax.vmap(stage, spmd_axis_name=over)(jax.tree.map(lambda p: own(p, t), by_stage), x, own_rows)
        x = _placed(x, "layers")
        passing = _placed(jnp.where(at(S - 1), x, jnp.roll(passing, -1, 0)), "layers")
        belt = jax.lax.dynamic_update_index_in_dim(belt, passing, slot, 1)
        return (_placed(belt, "layers", None), x), said

    def of_microbatches(a: jax.Array) -> jax.Array:
        """``[ticks, S, L / S, …]`` -> ``[M, L, …]``: stage s is at microbatch m in tick ``m + s``."""
        when = jnp.arange(M)[:, None] + jnp.arange(S)
        return a[when, jnp.arange(S)].reshape(M, -1, *a.shape[3:])

    with using(layout, mesh):  # rows are not cut over stages in here
        belt = split(x_BTD)
        belt = jnp.concatenate([belt, jnp.broadcast_to(belt[-1:], (S * K - M, *belt.shape[1:]))]) if S * K > M else belt
        belt = _placed(belt.reshape(S, K, *belt.shape[1:]), "layers", None)
        # Idle stages compute on rows that there are, so that nothing is infinite; none of it is used.
        (belt, _), said = jax.lax.scan(tick, (belt, belt[:, 0]), jnp.arange(M + S - 1))
        if S * K == M:
            out = jnp.roll(belt, 1 - S, 1).reshape(M, *belt.shape[2:])
        else:  # what left the last stage in tick m + S - 1 has since moved down once in K ticks
            m = jnp.arange(M)
            out = belt[S - 1 - (M - 1 - m) // K, (m + S - 1) % K]
    return constrain(whole(out), "batch", "stream", None), join(jax.tree.map(of_microbatches, said))


def _placed(a: jax.Array, *first: str | None) -> jax.Array:
    """``[S, b, T, D]`` or ``[S, K, b, T, D]`` where it belongs."""
    return constrain(a, *first, "batch", "stream", None)
