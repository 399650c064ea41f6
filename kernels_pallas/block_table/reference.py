"""Attention to listed key blocks: the truth over all pairs, and the form for XLA that gathers what is listed.

Letters: B rows, T queries, S key slots, H query heads, K key heads (H = K * G), d head width, Q query blocks, n entries
of a list, N key blocks, w slots of a key block, h heads that have a list of their own (H or K), R queries that share a
list (of one query block, of all H / h heads), P turns.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.block_table.problem import Filled
from kernels_pallas.common import NEG, precision

GATHERED = 2**26  # bytes of keys and values gathered at a time, about


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """float32 ``x[..., d]`` with the pairs ``(i, i + m)`` of its first 2 m channels turned by ``angles[..., m]``."""
    m = angles.shape[-1]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b, rest = x[..., :m], x[..., m : 2 * m], x[..., 2 * m :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def reference(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, blocks_BhQn: jax.Array, problem: Filled
) -> tuple[jax.Array, jax.Array]:
    """Every pair in float32 -> output ``[B, T, H, d]`` as `q`, log-sum-exp float32 ``[B, T, H]``.

    The table becomes a mask over all blocks, entry by entry; turns rotate the keys back, one copy of them per turn.
    """
    (B, T, H, _), (K, S) = q_BTHd.shape, k_BKSd.shape[1:3]
    h, Q, n = blocks_BhQn.shape[1:]
    turn_BhQn, angles_Pm, softcap = problem.turn, problem.angles, problem.softcap
    N = -(-S // problem.block_size)
    every = jnp.arange(N)
    listed = jnp.zeros((B, h, Q, N), bool)
    turns = jnp.zeros((B, h, Q, N), jnp.int32)
    for entry in range(n):  # the first entry that lists a block counts
        new = (blocks_BhQn[..., entry, None] == every) & ~listed
        listed |= new
        if turn_BhQn is not None:
            turns = jnp.where(new, turn_BhQn[..., entry, None], turns)

    def pairs(x: jax.Array) -> jax.Array:
        """``[B, h, Q, N]`` for every query head, query and key: ``[B, H, T, S]``."""
        x = jnp.repeat(x, H // h, axis=1)[:, :, jnp.arange(T) // problem.q_block]
        return x[..., jnp.arange(S) // problem.block_size]

    live = jnp.arange(S) < problem.lengths[:, None]
    causal = jnp.arange(S) <= problem.positions[:, :, None]
    seen = pairs(listed) & (live[:, None] & causal)[:, None]
    q, keys, values = (x.astype(jnp.float32) for x in (q_BTHd, k_BKSd, jnp.where(live[:, None, :, None], v_BKSd, 0)))
    keys, values = (jnp.repeat(x, H // K, axis=1) for x in (keys, values))
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.zeros((B, H, T, S))
    which = pairs(turns)
    for p in range(1 if angles_Pm is None else angles_Pm.shape[0]):
        turned = keys if angles_Pm is None else rotate(keys, -angles_Pm[p])
        scores = jnp.where(which == p, problem.scale * dot("bthd,bhsd->bhts", q, turned), scores)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.maximum(scores.max(-1, keepdims=True), NEG)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = dot("bhts,bhsd->bthd", weights / jnp.where(total > 0, total, 1.0), values)
    return out.astype(q_BTHd.dtype), (top + jnp.log(total))[..., 0].swapaxes(1, 2)


def in_units(q_BTHd: jax.Array, positions_BT: jax.Array, h: int, q_block: int) -> tuple[jax.Array, jax.Array]:
    """Queries by the list they share ``[B, h, Q, R, d]``, and their positions ``[B, Q, R]``; -1 past the last."""
    B, T, H, d = q_BTHd.shape
    g, rest = H // h, -T % q_block
    q = jnp.pad(q_BTHd, ((0, 0), (0, rest), (0, 0), (0, 0))).reshape(B, -1, q_block, h, g, d)
    at = jnp.pad(positions_BT, ((0, 0), (0, rest)), constant_values=-1).reshape(B, -1, q_block)
    return q.transpose(0, 3, 1, 4, 2, 5).reshape(B, h, -1, g * q_block, d), jnp.tile(at, (1, 1, g))


def from_units(x_BhQR: jax.Array, T: int, H: int, q_block: int) -> jax.Array:
    """``[B, h, Q, R, ...]`` as ``[B, T, H, ...]``."""
    B, h, Q = x_BhQR.shape[:3]
    x = jnp.moveaxis(x_BhQR.reshape(B, h, Q, H // h, q_block, *x_BhQR.shape[4:]), (2, 4), (1, 2))
    return x.reshape(B, Q * q_block, H, *x_BhQR.shape[4:])[:, :T]


def turning(q: jax.Array, angles_Pm: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Cosines and signed sines ``[P, d]``, 1 and 0 where nothing turns, and queries with their halves swapped."""
    m, d = angles_Pm.shape[-1], q.shape[-1]
    cos, sin = jnp.cos(angles_Pm), jnp.sin(angles_Pm)
    rest = ((0, 0), (0, d - 2 * m))
    cos = jnp.pad(jnp.concatenate([cos, cos], -1), rest, constant_values=1.0)
    sin = jnp.pad(jnp.concatenate([-sin, sin], -1), rest)
    return (cos, sin), jnp.concatenate([q[..., m : 2 * m], q[..., :m], q[..., 2 * m :]], axis=-1)


def xla(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, blocks_BhQn: jax.Array, problem: Filled
) -> tuple[jax.Array, jax.Array]:
    """The same in XLA operations, differentiable in q, k and v: the blocks of a few lists are gathered at a time."""
    B, T, H, d = q_BTHd.shape
    K, S = k_BKSd.shape[1:3]
    h, Q, n = blocks_BhQn.shape[1:]
    w, q_block, dtype = problem.block_size, problem.q_block, q_BTHd.dtype
    angles_Pm, softcap = problem.angles, problem.softcap
    N = -(-S // w)
    q, at = in_units(q_BTHd, problem.positions, h, q_block)
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, N * w - S), (0, 0))).reshape(B, K, N, w, d) for x in (k_BKSd, v_BKSd))
    dot = functools.partial(jnp.einsum, precision=precision(dtype), preferred_element_type=jnp.float32)
    rows, heads = jnp.arange(B)[:, None, None, None], (jnp.arange(h) * K // h)[None, :, None, None]
    end = jnp.minimum(problem.lengths, S)[:, None, None, None, None]

    def some(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """Lists ``[B, h, c, n]``, their queries ``[B, h, c, R, d]`` and positions ``[B, c, R]``."""
        q, at, ids, turn = xs
        twice = (ids[..., :, None] == ids[..., None, :]) & (jnp.arange(n)[:, None] > jnp.arange(n))
        good = (ids >= 0) & (ids < N) & ~twice.any(-1)
        ids = jnp.clip(ids, 0, N - 1)
        slots = ids[..., None] * w + jnp.arange(w)  # [B, h, c, n, w]
        live = good[..., None] & (slots < end)
        values = jnp.where(live[..., None], v[rows, heads, ids], 0)
        queries = jnp.broadcast_to(q[:, :, :, None], (*ids.shape, *q.shape[3:]))
        if turn is not None and angles_Pm is not None:
            queries = rotate(queries.astype(jnp.float32), angles_Pm[turn][..., None, :]).astype(dtype)
        scores = problem.scale * dot("bhcnrd,bhcnwd->bhcrnw", queries, k[rows, heads, ids])
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = live[:, :, :, None] & (slots[:, :, :, None] <= at[:, None, :, :, None, None])
        scores = jnp.where(seen, scores, NEG)
        top = jax.lax.stop_gradient(scores.max((-2, -1), keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = weights.sum((-2, -1))
        safe = jnp.where(total > 0, total, 1.0)
        out = dot("bhcrnw,bhcnwd->bhcrd", weights.astype(dtype), values) / safe[..., None]
        return out.astype(dtype), jnp.where(total > 0, top[..., 0, 0] + jnp.log(safe), -jnp.inf)

    one = 2 * B * h * n * w * d * jnp.dtype(dtype).itemsize
    few = max(1, min(Q, GATHERED // one))
    rest = -Q % few

    def pieces(x: jax.Array | None, axis: int, fill: int) -> Any:
        """Pieces of `few` lists, leading."""
        if x is None:
            return None
        pads = [(0, rest if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pads, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, few, *x.shape[axis + 1 :]), axis, 0)

    xs = (pieces(q, 2, 0), pieces(at, 1, -1), pieces(blocks_BhQn, 2, -1), pieces(problem.turn, 2, 0))
    out, lse = jax.lax.map(jax.checkpoint(some), xs)  # [pieces, B, h, few, R, ...]
    out, lse = (jnp.moveaxis(x, 0, 2).reshape(B, h, Q + rest, *x.shape[4:])[:, :, :Q] for x in (out, lse))
    return from_units(out, T, H, q_block), from_units(lse, T, H, q_block)
