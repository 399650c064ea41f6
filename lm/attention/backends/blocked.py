"""Blocked attention with online softmax: never materialises ``[T, S]``, visits only the mask's non-empty tiles.

Forward and backward walk one flat list of tiles (query-major) with `lax.scan`, so the compiled program does not grow
with the length; the backward pass recomputes probabilities from the log-sum-exp (arXiv 2205.14135). Memory: inputs,
outputs and one tile of logits ``[B, K, G * block_q, block_k]``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.attention.backends.dense import gathered, spread
from lm.attention.backends.listed import by_block
from lm.attention.branches import NEG, AnyBranch, BlockBranch, Branch, Context, merge
from lm.attention.masks import Mask
from lm.attention.tiles import Grid, visit


@dataclass(frozen=True)
class _Spec:
    mask: Mask
    grid: Grid
    positions: Any
    n_heads: int
    softcap: float | None
    segments: bool
    biased: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Side:
    """Per-token data of one side, padded to whole blocks and blocked ``[n_blocks, B, block]``."""

    index: jax.Array
    positions: jax.Array
    segments: jax.Array


def attend(
    ctx: Context,
    branches: tuple[AnyBranch, ...],
    softcap: float | None,
    block_q: int,
    block_k: int,
) -> tuple[jax.Array, jax.Array]:
    """Same contract as `lm.attention.backends.dense.attend`."""
    T, H = ctx.q_BTHd.shape[1:3]
    outs, lses = [], []
    for branch in branches:
        if isinstance(branch, BlockBranch):
            out, lse = by_block(branch, ctx, softcap)
        elif branch.gather_BHTn is not None:
            s, v = gathered(branch, ctx, softcap)
            out, lse = _softmax_of(s, v)
        else:
            out, lse = _branch(ctx.of(branch), branch, softcap, block_q, block_k)
        rows = None if isinstance(branch, BlockBranch) else branch.rows
        outs.append(spread(out, rows, T))
        lses.append(spread(lse, rows, T, NEG))
    out, lse = merge(outs, lses)
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def _softmax_of(s: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    p = jnp.where(s <= NEG / 2, 0.0, jnp.exp(s - top))
    total = p.sum(-1)
    safe = jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("bhtn,bhtnd->bhtd", (p / safe[..., None]).astype(v.dtype), v)
    return out, jnp.where(total == 0, NEG, top[..., 0] + jnp.log(safe))


def _branch(
    ctx: Context, branch: Branch, softcap: float | None, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """One branch: output ``[B, H, rows, d]`` and log-sum-exp ``[B, H, rows]``."""
    B, T, H, d = ctx.q_BTHd.shape
    S, K = ctx.k_BSKd.shape[1:3]
    rows = min(branch.rows, T) if isinstance(branch.rows, int) else T
    aligned = T == S and not ctx.apart
    contiguous = ctx.queries.contiguous and ctx.keys.contiguous and aligned
    grid = Grid(rows, S, min(block_q, rows), min(block_k, S), T - rows, contiguous, aligned)
    (q, qp), (k, kp) = ctx.queries_at(branch.q_positions, rows), ctx.keys_at(branch.k_positions)
    q = q * ctx.scale
    qs, ks = ctx.queries.segments_BT, ctx.keys.segments_BT
    segments = qs is not None and ks is not None
    biased = ctx.positions.bias(jnp.zeros((1, 1)), jnp.zeros((1, 1)), H) is not None
    spec = _Spec(branch.mask, grid, ctx.positions, H, softcap, segments, biased)
    n_q, n_k = grid.blocks
    side_q = _Side(
        _blocks(ctx.queries.index_BT[:, T - rows :], n_q, grid.block_q, -1),
        _blocks(qp, n_q, grid.block_q, 0),
        _blocks(qs[:, T - rows :] if qs is not None and segments else jnp.zeros_like(qp), n_q, grid.block_q, 0),
    )
    side_k = _Side(
        _blocks(ctx.keys.index_BT, n_k, grid.block_k, -1),
        _blocks(kp, n_k, grid.block_k, 0),
        _blocks(ks if ks is not None and segments else jnp.zeros_like(kp), n_k, grid.block_k, 0),
    )
    # [n_blocks, B, K, G * block_q, d]: heads lead, so that a tile is one batched matrix product.
    q = _blocks(q, n_q, grid.block_q, 0).reshape(n_q, B, grid.block_q, K, H // K, d)
    q = q.transpose(0, 1, 3, 4, 2, 5).reshape(n_q, B, K, -1, d)
    k, v = (_blocks(x, n_k, grid.block_k, 0).transpose(0, 1, 3, 2, 4) for x in (k, ctx.v_BSKd))
    out, lse = _flash(spec, q, k, v, side_q, side_k)
    out = out.reshape(n_q, B, H, grid.block_q, d).transpose(1, 2, 0, 3, 4).reshape(B, H, -1, d)
    lse = lse.reshape(n_q, B, H, grid.block_q).transpose(1, 2, 0, 3).reshape(B, H, -1)
    return out[:, :, :rows], lse[:, :, :rows]


def _blocks(x: jax.Array, n: int, size: int, fill: int) -> jax.Array:
    """``[B, T, …]`` -> ``[n, B, size, …]``, padded with `fill`."""
    pad = [(0, 0), (0, n * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], n, size, *x.shape[2:]), 1, 0)


def _tile_logits(
    spec: _Spec, q: jax.Array, k: jax.Array, side_q: _Side, side_k: _Side, i: Any, j: Any, whole: Any
) -> tuple[jax.Array, jax.Array]:
    """float32 logits ``[B, K, G * bq, bk]`` of tile (i, j), invisible pairs at `NEG`, and d logit / d (q k)."""
    B, K, gq, _ = q.shape
    g = spec.n_heads // K
    s = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32)
    if spec.biased:
        bias = spec.positions.bias(side_q.positions[i], side_k.positions[j], spec.n_heads)
        s = s + bias.reshape(B, K, gq, -1)
    slope = jnp.ones((), jnp.float32)
    if spec.softcap is not None:
        t = jnp.tanh(s / spec.softcap)
        s, slope = spec.softcap * t, 1.0 - t * t
    qi, ki = side_q.index[i][:, :, None], side_k.index[j][:, None, :]
    seen = (spec.mask(qi, ki) & (ki >= 0) & (qi >= 0)) | (whole > 0)
    if spec.segments:
        seen &= side_q.segments[i][:, :, None] == side_k.segments[j][:, None, :]
    seen = jnp.tile(seen, (1, g, 1))[:, None]
    return jnp.where(seen, s, NEG), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    spec: _Spec, q: jax.Array, k: jax.Array, v: jax.Array, side_q: _Side, side_k: _Side
) -> tuple[jax.Array, jax.Array]:
    tiles = visit(spec.mask, spec.grid)
    n_q, B, K, gq, d = q.shape
    outs, lses = jnp.zeros(q.shape, v.dtype), jnp.full((n_q, B, K, gq), NEG, jnp.float32)
    if not len(tiles):
        return outs, lses
    starts = np.r_[True, tiles[1:, 0] != tiles[:-1, 0]]

    def step(carry: Any, tile: Any) -> tuple[Any, None]:
        top, total, acc, outs, lses = carry
        (i, j, whole), start = tile
        top, total, acc = (jnp.where(start, z, x) for x, z in ((top, NEG), (total, 0.0), (acc, 0.0)))
        s, _ = _tile_logits(spec, q[i], k[j], side_q, side_k, i, j, whole)
        new = jnp.maximum(top, s.max(-1))
        p = jnp.where(s <= NEG / 2, 0.0, jnp.exp(s - new[..., None]))
        keep = jnp.exp(top - new)
        total = total * keep + p.sum(-1)
        pv = jnp.einsum("bkqs,bksd->bkqd", p.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
        acc = acc * keep[..., None] + pv
        safe = jnp.where(total == 0, 1.0, total)
        outs = jax.lax.dynamic_update_index_in_dim(outs, (acc / safe[..., None]).astype(outs.dtype), i, 0)
        lse = jnp.where(total == 0, NEG, new + jnp.log(safe))
        lses = jax.lax.dynamic_update_index_in_dim(lses, lse, i, 0)
        return (new, total, acc, outs, lses), None

    zero = jnp.zeros((B, K, gq), jnp.float32)
    carry = (zero + NEG, zero, jnp.zeros((B, K, gq, d), jnp.float32), outs, lses)
    (_, _, _, outs, lses), _ = jax.lax.scan(step, carry, (tuple(tiles.T), starts))
    return outs, lses


def _flash_fwd(spec: _Spec, q: Any, k: Any, v: Any, side_q: _Side, side_k: _Side) -> Any:
    out, lse = _flash(spec, q, k, v, side_q, side_k)
    return (out, lse), (q, k, v, side_q, side_k, out, lse)


def _flash_bwd(spec: _Spec, saved: Any, cotangents: Any) -> Any:
    q, k, v, side_q, side_k, out, lse = saved
    d_out, d_lse = cotangents
    tiles = visit(spec.mask, spec.grid)
    # d logit = p * (dO . v - sum(dO * O) + dLSE)
    shift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    # Sums over queries as [d, q] @ [q, s]: the small factor is the one that gets transposed, once, not the tile.
    q_T, d_out_T = (jnp.swapaxes(x, -1, -2) for x in (q, d_out))
    grads = tuple(jnp.zeros(x, jnp.float32) for x in (q.shape, *(jnp.swapaxes(y, -1, -2).shape for y in (k, v))))

    def add(x: jax.Array, y: jax.Array, i: Any) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(x, old + y, i, 0)

    def step(carry: Any, tile: Any) -> tuple[Any, None]:
        dq, dk, dv = carry
        i, j, whole = tile
        s, slope = _tile_logits(spec, q[i], k[j], side_q, side_k, i, j, whole)
        p = jnp.where(s <= NEG / 2, 0.0, jnp.exp(s - lse[i][..., None]))
        do = d_out[i].astype(jnp.float32)
        dp = jnp.einsum("bkqd,bksd->bkqs", do, v[j].astype(jnp.float32))
        ds = p * (dp - shift[i][..., None]) * slope
        dq = add(dq, jnp.einsum("bkqs,bksd->bkqd", ds, k[j].astype(jnp.float32)), i)
        dk = add(dk, jnp.einsum("bkdq,bkqs->bkds", q_T[i].astype(jnp.float32), ds), j)
        dv = add(dv, jnp.einsum("bkdq,bkqs->bkds", d_out_T[i].astype(jnp.float32), p), j)
        return (dq, dk, dv), None

    if len(tiles):
        grads, _ = jax.lax.scan(step, grads, tuple(tiles.T))
    dq, dk, dv = grads[0], *(jnp.swapaxes(g, -1, -2) for g in grads[1:])
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip((dq, dk, dv), (q, k, v), strict=True))
    return dq, dk, dv, _no_gradient(side_q), _no_gradient(side_k)


def _no_gradient(side: _Side) -> Any:
    """Indices and segments have none; positions are data here (biases do not differentiate their positions)."""

    def zero(x: jax.Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros_like(x)
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, side)


_flash.defvjp(_flash_fwd, _flash_bwd)
