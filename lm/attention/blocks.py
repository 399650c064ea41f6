"""Blocks of keys, their summaries, and the choice among them: what block-memory patterns share.

A row's tokens fall into blocks of a fixed size, counted from the start of their document. A `Summary` condenses the
queries, keys and values of a complete block; later queries score the summaries, `select` turns scores into block ids,
`rank_positions` says where the chosen blocks then sit, and a `lm.attention.branches.BlockBranch` attends to them.

Letters beyond those of `lm.attention.branches`: N blocks, n chosen blocks, w tokens of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.attention.branches import Context, Tokens

STEP = 512  # queries scored at a time


class Summary:
    """What is kept of a block, and how a query ranks it: a frozen dataclass with a field `size`, tokens of a block."""

    size: int

    def places(self, index: jax.Array) -> jax.Array:
        """Positions, float32, that keys (and the queries that are summarised with them) are rotated to, by in-document
        index: where a block cache keeps them."""
        raise NotImplementedError

    def zeros(self, batch: int, n: int, n_heads: int, head_dim: int, dtype: DTypeLike) -> jax.Array:
        """Room for `n` summaries: ``[batch, n, ...]``."""
        raise NotImplementedError

    def summarise(self, q_BNwHd: jax.Array, k_BNwKd: jax.Array, v_BNwKd: jax.Array, scale: float) -> jax.Array:
        """Summaries ``[B, N, ...]`` of complete blocks; queries and keys at their `places`."""
        raise NotImplementedError

    def score(self, q_BTHd: jax.Array, summaries: jax.Array) -> jax.Array:
        """float32 ``[B, H, T, N]``: how much raw queries want each block."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockTable:
    """The blocks of every row: the slot of the first key, the number of the block within its document (-1: no complete
    block), the document, and the summary. Rows are ordered by slot, so by number within a document."""

    starts_BN: jax.Array
    numbers_BN: jax.Array
    segments_BN: jax.Array | None
    summaries: jax.Array


def select(scores: jax.Array, forced: jax.Array, allowed: jax.Array, k: int, share: int = 1) -> jax.Array:
    """The ids int32 ``[..., k]`` of `k` blocks for every query, ascending, then -1 where fewer are allowed.

    `scores` float ``[B, H, T, N]``; `forced` and `allowed` bool, broadcast to it: a forced block is taken before any
    other, a block that is not allowed never, whatever its score; ties go to the earlier block. `share` consecutive
    heads choose together, by the sum of their scores: 1 = each alone, H / K = those of a key/value head, H = all.
    """
    B, H, T, N = scores.shape
    s = scores.astype(jnp.float32)
    if share > 1:
        s = jnp.repeat(s.reshape(B, H // share, share, T, N).sum(2), share, axis=1)
    allowed = jnp.broadcast_to(allowed, s.shape)
    s = jnp.where(forced, jnp.inf, jnp.clip(s, -1e30, 1e30))
    s = jax.lax.stop_gradient(jnp.where(allowed, s, -jnp.inf))
    ids = jax.lax.top_k(s, min(k, N))[1]
    ids = jnp.where(jnp.take_along_axis(allowed, ids, axis=-1), ids, N)
    ids = jnp.sort(ids, axis=-1)
    ids = jnp.pad(jnp.where(ids == N, -1, ids), ((0, 0), (0, 0), (0, 0), (0, max(k - N, 0))), constant_values=-1)
    return ids.astype(jnp.int32)


def rank_positions(ids: jax.Array, size: int, tail: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks side by side in the order listed: float32 position of each block's first key ``[..., n]`` (-1 entries take
    no room), and of the query ``[...]``, which has place `tail` (int ``[...]``) in the last block listed."""
    taken = (ids >= 0).astype(jnp.int32)
    starts = (jnp.cumsum(taken, axis=-1) - taken) * size
    query = (taken.sum(-1) - 1) * size + tail
    return starts.astype(jnp.float32), query.astype(jnp.float32)


def table(ctx: Context, summary: Summary) -> BlockTable:
    """The complete blocks of rows that hold their tokens side by side: padded, packed or plain."""
    w, index, segments = summary.size, ctx.keys.index_BT, ctx.keys.segments_BT
    B, S = index.shape
    N = S // w
    if ctx.keys.contiguous:
        numbers = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
        starts, at = numbers * w, None
    else:
        starts = _starts(index, segments, w)
        first = jnp.maximum(starts, 0)
        numbers = jnp.where(starts >= 0, jnp.take_along_axis(index, first, 1) // w, -1)
        at = None if segments is None else jnp.take_along_axis(segments, first, 1)
    places = summary.places(index)
    q = ctx.positions.rotate(ctx.q_BTHd, places[:, :, None], ctx.length)
    k = ctx.keys_at(None if ctx.rotated else places)[0]
    return BlockTable(starts, numbers, at, _summaries(summary, starts, ctx.scale, q, k, ctx.v_BSKd))


def _starts(index: jax.Array, segments: jax.Array | None, w: int) -> jax.Array:
    """Slots int32 ``[B, S // w]`` where a complete block starts, ascending, then -1."""
    B, S = index.shape
    room = S - w + 1
    if room < 1:
        return jnp.full((B, S // w), -1, jnp.int32)
    whole = (index[:, :room] >= 0) & (index[:, :room] % w == 0) & (index[:, w - 1 :] - index[:, :room] == w - 1)
    if segments is not None:
        whole &= segments[:, :room] == segments[:, w - 1 :]
    slots = jnp.where(whole, jnp.arange(room, dtype=jnp.int32), S)
    slots = jnp.sort(slots, axis=1)[:, : S // w]
    slots = jnp.pad(slots, ((0, 0), (0, S // w - slots.shape[1])), constant_values=S)
    return jnp.where(slots == S, -1, slots)


def take(x_BSXd: jax.Array, starts_BN: jax.Array, size: int) -> jax.Array:
    """Blocks ``[B, N, size, ...]`` of a row's slots; those that start nowhere (-1) repeat the first."""
    slots = jnp.maximum(starts_BN, 0)[:, :, None] + jnp.arange(size)
    rows = jnp.arange(x_BSXd.shape[0])[:, None, None]
    return x_BSXd[rows, jnp.minimum(slots, x_BSXd.shape[1] - 1)]


def _summaries(
    summary: Summary, starts: jax.Array, scale: float, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """A few blocks at a time, so that memory does not grow with the text."""
    q, k, v = (jax.lax.stop_gradient(x) for x in (q, k, v))
    B, N = starts.shape
    few = max(1, STEP // summary.size)

    def some(at: jax.Array) -> jax.Array:
        w = summary.size
        return summary.summarise(take(q, at, w), take(k, at, w), take(v, at, w), scale)

    if N <= few:
        return some(starts)
    rest = -N % few
    groups = jnp.pad(starts, ((0, 0), (0, rest))).reshape(B, -1, few).swapaxes(0, 1)
    out = jax.lax.map(some, groups)
    return jnp.moveaxis(out, 0, 1).reshape(B, N + rest, *out.shape[3:])[:, :N]


def over_queries(fn: Callable[..., Any], n: int, *arrays: jax.Array) -> Any:
    """``fn`` of pieces of `n` queries of arrays ``[B, T, …]``; results ``[B, H, T, …]`` are put together again."""
    T = arrays[0].shape[1]
    if T <= n:
        return fn(*arrays)
    rest = -T % n

    def pieces(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], -1, n, *x.shape[2:]), 1, 0)

    def whole(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :T]

    return jax.tree.map(whole, jax.lax.map(lambda xs: fn(*xs), tuple(pieces(x) for x in arrays)))


def pick(
    q_BTHd: jax.Array,
    queries: Tokens,
    table: BlockTable,
    summary: Summary,
    k: int,
    candidates: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Ids int32 ``[B, H, T, k]`` of `table`, a few queries at a time.

    ``candidates(index[B, T, 1], numbers[B, 1, N]) -> bool``: whether a query may choose a block of its own document.
    """
    score = functools.partial(summary.score, summaries=table.summaries)

    def some(q: jax.Array, index: jax.Array, segments: jax.Array) -> jax.Array:
        numbers = table.numbers_BN[:, None]
        allowed = candidates(index[:, :, None], numbers) & (numbers >= 0) & (index[:, :, None] >= 0)
        if table.segments_BN is not None and queries.segments_BT is not None:
            allowed &= segments[:, :, None] == table.segments_BN[:, None]
        return select(score(jax.lax.stop_gradient(q)), jnp.zeros((), bool), allowed[:, None], k)

    segments = queries.index_BT if queries.segments_BT is None else queries.segments_BT
    return over_queries(some, STEP, q_BTHd, queries.index_BT, segments)
