"""Attention to listed blocks (`lm.attention.branches.BlockBranch`): a direct form, and one sorted by block.

The direct form gathers the keys of every query's own blocks: the reference, and right for one query. The sorted form
groups all (query, head, entry) pairs of some queries by the block they want and multiplies tiles of such pairs with
that block: keys are read once per tile instead of once per pair, and the work is matrix products. Both are exact.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import mapped
from lm.attention.blocks import over_queries, take
from lm.attention.branches import NEG, BlockBranch, Context
from lm.attention.mesh_split import mesh_split
from lm.sharding import parts

PAIRS = 2**17  # pairs sorted together, at most: 32 MiB of rotated queries with 64 channels


def direct(branch: BlockBranch, ctx: Context, softcap: float | None) -> tuple[jax.Array, jax.Array]:
    """Logits float32 ``[B, H, T, n * w]`` (masked to `NEG`) and values ``[B, H, T, n * w, d]``."""
    ids, w = branch.ids_BHTn, branch.size
    B, H, T, n = ids.shape
    S, K = ctx.k_BSKd.shape[1:3]
    k, _ = ctx.keys_at(branch.k_positions)
    starts = jnp.take_along_axis(branch.starts_BN, jnp.maximum(ids, 0).reshape(B, -1), 1).reshape(ids.shape)
    slots = starts[..., None] + jnp.arange(w)
    there = (ids >= 0)[..., None] & (starts >= 0)[..., None] & (slots < S)
    slots = jnp.clip(slots, 0, S - 1)
    rows, kv = jnp.arange(B)[:, None, None, None, None], (jnp.arange(H) // (H // K))[None, :, None, None, None]
    q = _turned(ctx, ctx.q_BTHd, branch.q_positions, n)
    s = jnp.einsum("bhtnd,bhtnwd->bhtnw", q, k[rows, slots, kv], preferred_element_type=jnp.float32) * ctx.scale
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    qi, ki = ctx.queries.index_BT[:, None, :, None, None], ctx.keys.index_BT[rows, slots]
    seen = there & branch.mask(qi, ki) & (ki >= 0) & (qi >= 0)
    qs, ks = ctx.queries.segments_BT, ctx.keys.segments_BT
    if qs is not None and ks is not None:
        seen &= qs[:, None, :, None, None] == ks[rows, slots]
    values = ctx.v_BSKd[rows, slots, kv]
    return jnp.where(seen, s, NEG).reshape(B, H, T, -1), values.reshape(B, H, T, n * w, -1)


def by_block(
    branch: BlockBranch, ctx: Context, softcap: float | None, tile: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, H, T, d]`` and log-sum-exp float32 ``[B, H, T]``; `tile`: pairs that share one read of a block.

    Under a layout every device sorts the pairs of its own rows and heads: the compiler, left alone, cuts the sorted
    blocks of all heads, and asks all devices for each tile's.
    """
    over = mesh_split(ctx)
    if over is None or parts("length") > 1:
        return _by_block(branch, ctx, softcap, tile)
    P, rows, heads = jax.sharding.PartitionSpec, over.batch_axis, over.head_axis
    by_token, by_head = P(rows, None, heads), P(rows, heads)
    places = by_head if branch.q_positions.shape[1] == ctx.q_BTHd.shape[2] else P(rows)
    arrays: dict[str, tuple[Any, Any]] = {
        "q_BTHd": (ctx.q_BTHd, by_token),
        "k_BSKd": (ctx.k_BSKd, by_token),
        "queries": (ctx.queries, P(rows)),
        "keys": (ctx.keys, P(rows)),
        "length": (ctx.length, P()),
        "starts_BN": (branch.starts_BN, P(rows)),
        "ids_BHTn": (branch.ids_BHTn, by_head),
        "q_positions": (branch.q_positions, places),
        "v": (ctx.v_BSKd, by_token),
    }
    if isinstance(branch.k_positions, jax.Array):
        arrays["k_positions"] = branch.k_positions, P(rows)

    def local(x: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        mine = {name: x[name] for name in ("starts_BN", "ids_BHTn", "q_positions", "k_positions") if name in x}
        keys = dataclasses.replace(ctx.sources[0], k_BSKd=x["k_BSKd"], v_BSKd=x["v"], tokens=x["keys"])
        here = {"q_BTHd": x["q_BTHd"], "queries": x["queries"], "length": x["length"]}
        own = dataclasses.replace(ctx, **here, sources=(keys,), blocks=None)
        return _by_block(dataclasses.replace(branch, **mine), own, softcap, tile)

    specs = {name: spec for name, (_, spec) in arrays.items()}
    return mapped(local, over.mesh, (specs,), (by_head, by_head))({name: array for name, (array, _) in arrays.items()})


def _by_block(
    branch: BlockBranch, ctx: Context, softcap: float | None, tile: int | None
) -> tuple[jax.Array, jax.Array]:
    B, H, T, n = branch.ids_BHTn.shape
    k, _ = ctx.keys_at(branch.k_positions)
    starts, w = branch.starts_BN, branch.size
    # [B * K * N, w, …]: a tile reads one block of one key/value head, which lies in one piece.
    kv = _per_head(take(k, starts, w)), _per_head(take(ctx.v_BSKd, starts, w))
    slots = starts[:, :, None] + jnp.arange(w)
    inside = (starts >= 0)[:, :, None] & (slots < ctx.k_BSKd.shape[1])
    index = jnp.where(inside, take(ctx.keys.index_BT, starts, w), -1)
    segments = ctx.keys.segments_BT
    side = (index, None if segments is None else take(segments, starts, w))
    at_once = max(1, min(T, PAIRS // (B * H * n)))
    tile = tile or (64 if B * H * n * at_once >= 4096 else 8)

    def some(q: jax.Array, ids: jax.Array, places: jax.Array, index: jax.Array, segs: jax.Array) -> Any:
        ids, places = jnp.moveaxis(ids, 1, 2), jnp.moveaxis(places, 1, 2)
        return _tiles(branch, ctx, softcap, tile, q, ids, places, (index, segs), kv, side)

    qs = ctx.queries.segments_BT
    return over_queries(
        some,
        at_once,
        ctx.q_BTHd,
        jnp.moveaxis(branch.ids_BHTn, 1, 2),
        jnp.moveaxis(branch.q_positions, 1, 2),
        ctx.queries.index_BT,
        ctx.queries.index_BT if qs is None else qs,
    )


def _sorted(group: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """The order that sorts groups 0 … `groups`, and the sorted groups."""
    P = group.shape[0]
    if (groups + 1) * P >= 2**32:
        order = jnp.argsort(group).astype(jnp.int32)
        return order, group[order]
    packed = jnp.sort(group.astype(jnp.uint32) * P + jnp.arange(P, dtype=jnp.uint32))  # one array sorts much faster
    return (packed % P).astype(jnp.int32), (packed // P).astype(jnp.int32)


def _turned(ctx: Context, q_BTHd: jax.Array, places: jax.Array, n: int) -> jax.Array:
    """Queries ``[B, H, T, n, d]``, one for every block, rotated to `places` ``[B, 1 or H, T, n]``."""
    B, T, H, d = q_BTHd.shape
    q = jnp.broadcast_to(jnp.swapaxes(q_BTHd, 1, 2)[:, :, :, None], (B, H, T, n, d))
    return jnp.asarray(ctx.positions.rotate(q, places, ctx.length))


def _per_head(x_BNwKd: jax.Array) -> jax.Array:
    B, N, w, K, d = x_BNwKd.shape
    return x_BNwKd.transpose(0, 3, 1, 2, 4).reshape(B * K * N, w, d)


def _tiles(
    branch: BlockBranch,
    ctx: Context,
    softcap: float | None,
    R: int,
    q_BTHd: jax.Array,
    ids: jax.Array,
    places: jax.Array,
    queries: tuple[jax.Array, jax.Array],
    kv: tuple[jax.Array, jax.Array],
    side: tuple[jax.Array, jax.Array | None],
) -> tuple[jax.Array, jax.Array]:
    """All pairs of a few queries, `R` to a tile: out ``[B, H, T, d]`` and log-sum-exp ``[B, H, T]``."""
    B, H, T, n = ids.shape
    K, N, d = ctx.k_BSKd.shape[2], branch.starts_BN.shape[1], q_BTHd.shape[-1]
    groups, P = B * K * N, B * H * T * n
    q = (_turned(ctx, q_BTHd, places, n) * ctx.scale).reshape(P, d)
    qi, qs = (jnp.broadcast_to(x[:, None, :, None], ids.shape).reshape(P) for x in queries)
    rows, heads = jnp.arange(B)[:, None, None, None], (jnp.arange(H) // (H // K))[None, :, None, None]
    group = jnp.where(ids >= 0, (rows * K + heads) * N + ids, groups).reshape(P)
    order, ordered = _sorted(group, groups)
    edges = jnp.searchsorted(ordered, jnp.arange(groups + 1)).astype(jnp.int32)  # first pair of every group
    n_tiles = -(-jnp.diff(edges) // R)
    last = jnp.cumsum(n_tiles)  # tiles up to and with the group's
    total = last[-1]
    few = 4 if jax.default_backend() == "cpu" else 256
    M = -(-(P // R + min(groups, P)) // few) * few
    number = jnp.arange(M, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(last, number, side="right"), groups - 1).astype(jnp.int32)
    first = edges[owner] + (number - (last[owner] - n_tiles[owner])) * R
    count = jnp.where(number < total, jnp.clip(edges[owner + 1] - first, 0, R), 0)
    padded = jnp.pad(order, (0, R))
    k_index, k_segments = side

    def one(owner: jax.Array, first: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        pair = jax.lax.dynamic_slice(padded, (first,), (R,))
        k, v = kv[0][owner], kv[1][owner]
        s = jnp.einsum("rd,wd->rw", q[pair], k, preferred_element_type=jnp.float32)
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        b, block = owner // (K * N), owner % N
        i, j = qi[pair][:, None], k_index[b, block][None]
        seen = branch.mask(i, j) & (i >= 0) & (j >= 0) & (jnp.arange(R) < count)[:, None]
        if k_segments is not None:
            seen &= qs[pair][:, None] == k_segments[b, block][None]
        s = jnp.where(seen, s, NEG)
        top = jax.lax.stop_gradient(s.max(-1))
        p = jnp.where(s <= NEG / 2, 0.0, jnp.exp(s - top[:, None]))
        mass = p.sum(-1)
        safe = jnp.where(mass == 0, 1.0, mass)
        out = jnp.einsum("rw,wd->rd", p.astype(v.dtype), v, preferred_element_type=jnp.float32) / safe[:, None]
        return out, jnp.where(mass == 0, NEG, top + jnp.log(safe))

    def body(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, Any]:
        work = jax.checkpoint(jax.vmap(one))
        nothing = (jnp.zeros((few, R, d), jnp.float32), jnp.full((few, R), NEG, jnp.float32))
        return None, jax.lax.cond(xs[2][0] > 0, lambda: work(*xs), lambda: nothing)  # empty tiles come last

    _, (out, lse) = jax.lax.scan(body, None, tuple(x.reshape(-1, few) for x in (owner, first, count)))
    out, lse = out.reshape(M * R, d), lse.reshape(M * R)
    mine = jnp.minimum(group, groups - 1)
    sorted_at = jnp.zeros(P, jnp.int32).at[order].set(jnp.arange(P, dtype=jnp.int32))
    at = (last[mine] - n_tiles[mine]) * R + sorted_at - edges[mine]  # tiles of a group are adjacent
    at = jnp.where(group < groups, at, 0)
    lse = jnp.where(group < groups, lse[at], NEG).reshape(ids.shape)
    out = out[at].reshape(*ids.shape, d)
    top = jax.lax.stop_gradient(lse.max(-1, keepdims=True))
    weight = jnp.where(lse <= NEG / 2, 0.0, jnp.exp(lse - top))
    mass = weight.sum(-1, keepdims=True)
    safe = jnp.where(mass == 0, 1.0, mass)
    whole = jnp.einsum("bhtn,bhtnd->bhtd", weight / safe, out).astype(kv[1].dtype)
    return whole, jnp.where(mass == 0, NEG, top + jnp.log(safe))[..., 0]
