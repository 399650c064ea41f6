"""The backend ``pallas``: a union of branches by `kernels_pallas.branches`, which is the kernel `flash` per branch.

LM-Infinite is its window and its clamped sinks, two-range positions are their two ranges. Tiles are listed by the same
`lm.attention.tiles.visit` that the blocked backend walks. Listed blocks of keys
(`lm.attention.branches.BlockBranch`) go to `kernels_pallas.block_table` for a token added to a cache; several queries,
each with a list of its own, are sorted by block instead (`lm.attention.backends.listed.by_block`, XLA operations).

On a CPU the TPU kernel is interpreted, which is slow and meant for tests. Under a layout (`lm.sharding`) its devices
say what is compiled for, and each computes its rows and heads in `jax.shard_map`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import common
from kernels_pallas.block_table.api import block_table
from kernels_pallas.block_table.problem import Problem as Listed
from kernels_pallas.branches.api import branches as union
from kernels_pallas.branches.part import Part, Problem
from kernels_pallas.common import How, sized
from lm.attention.backends.listed import by_block
from lm.attention.branches import NEG, AnyBranch, BlockBranch, Branch, Context, merge
from lm.attention.masks import Causal
from lm.attention.mesh_split import mesh_split
from lm.attention.tiles import Grid, visit
from lm.errors import UserError
from lm.sharding import current

KEY = "model.mixer.backend: 'pallas'"
ELSE = "valid: auto, dense, blocked"


def refusal(ctx: Context, branches: tuple[AnyBranch, ...]) -> str | None:
    """Why the kernels cannot serve these branches, or None."""
    if any(isinstance(branch, Branch) and branch.gather_BHTn is not None for branch in branches):
        return "serves plain branches, and this pattern lists keys at run time"
    if any(isinstance(branch, Branch) and branch.source for branch in branches):
        return "serves one source of keys"
    if ctx.queries.ancestors_BTT is not None:
        return "serves texts, and these tokens are a tree"
    if _bias(ctx) and ctx.positions.head_slopes(ctx.q_BTHd.shape[2]) is None:
        return f"serves biases linear in distance, and {type(ctx.positions).__name__} is not"
    return None


def _device() -> Any:
    """A device that the program is for: of the layout (`lm.sharding`), else the default one."""
    found = current()
    return jax.devices()[0] if found is None else found[1].devices.flat[0]


def platform() -> str:
    """What the program is for."""
    return str(_device().platform)


def attend(
    ctx: Context,
    branches: tuple[AnyBranch, ...],
    softcap: float | None,
    block_q: int | None,
    block_k: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Same contract as `lm.attention.backends.dense.attend`; `UserError` for what the kernels cannot serve."""
    if reason := refusal(ctx, branches):
        raise UserError(f"{KEY} {reason}; {ELSE}")
    found = [_listed(ctx, branch, softcap) for branch in branches if isinstance(branch, BlockBranch)]
    plain = [branch for branch in branches if isinstance(branch, Branch)]
    if plain:
        slopes = jnp.asarray(ctx.positions.head_slopes(ctx.q_BTHd.shape[2]), jnp.float32) if _bias(ctx) else None
        one = union(
            [_part(ctx, branch) for branch in plain],
            ctx.v_BSKd,
            Problem(n_queries=ctx.q_BTHd.shape[1], slopes_H=slopes, scale=ctx.scale, softcap=softcap),
            _how(ctx, block_q=block_q, block_k=block_k),
        )
        found.append(one)
    return merge(*zip(*found, strict=True))


def _part(ctx: Context, branch: Branch) -> Part:
    """A branch as the kernel takes it: queries and keys turned to its positions, its tiles listed."""
    T, S = ctx.q_BTHd.shape[1], ctx.k_BSKd.shape[1]
    rows = min(branch.rows, T) if isinstance(branch.rows, int) else T
    (q, qp), (k, kp) = ctx.queries_at(branch.q_positions, rows), ctx.keys_at(branch.k_positions)
    queries, keys = ctx.queries, ctx.keys
    aligned = T == S and not ctx.apart
    contiguous = queries.contiguous and keys.contiguous and aligned
    segments = None
    if queries.segments_BT is not None and keys.segments_BT is not None:
        segments = (queries.segments_BT[:, T - rows :], keys.segments_BT)

    def tiles(n_queries: int, n_keys: int, block_q: int, block_k: int) -> np.ndarray:
        return visit(branch.mask, Grid(n_queries, n_keys, block_q, block_k, T - rows, contiguous, aligned))

    return Part(
        q,
        k,
        branch.mask,
        tiles=tiles,
        index=None if contiguous else (queries.index_BT[:, T - rows :], keys.index_BT),
        segments=segments,
        positions=(qp, kp),
        offset=T - rows,
        causal=contiguous and branch.mask == Causal() and segments is None,
    )


def _bias(ctx: Context) -> bool:
    """Whether positions add a bias to the logits."""
    return ctx.positions.bias(jnp.zeros((1, 1)), jnp.zeros((1, 1)), ctx.q_BTHd.shape[2]) is not None


def _how(ctx: Context, **sizes: int | None) -> How:
    """A kernel's implementation, chip, block sizes, mesh and axes."""
    device, over = _device(), mesh_split(ctx)
    kind = {"cpu": "interpret", "tpu": "tpu"}.get(device.platform, "auto")
    return How(kind, common.chip(device), sized(**sizes), **({} if over is None else over._asdict()))


def _listed(ctx: Context, branch: BlockBranch, softcap: float | None) -> tuple[jax.Array, jax.Array]:
    """One branch of listed blocks: output ``[B, T, H, d]`` and log-sum-exp ``[B, T, H]``.

    In a cache a block's keys lie side by side, token i in slot i, and the branch is such that a query sees all up to
    itself, or up to the token before, and blocks are a multiple of their size apart (`lm.attention.blocks`).
    """
    B, T, H, d = ctx.q_BTHd.shape
    S, w, n = ctx.k_BSKd.shape[1], branch.size, branch.ids_BHTn.shape[-1]
    if T > 1 or ctx.keys.leading != S:
        out, lse = by_block(branch, ctx, softcap)
        return out.swapaxes(1, 2), lse.swapaxes(1, 2)
    index, positions = ctx.queries.index_BT, ctx.positions
    last = jnp.where(branch.mask(index, index), index, jnp.where(branch.mask(index, index - 1), index - 1, -1))
    ids = branch.ids_BHTn
    starts = jnp.take_along_axis(branch.starts_BN, jnp.maximum(ids, 0).reshape(B, -1), 1).reshape(ids.shape)
    first = branch.q_positions[..., 0]  # of the query, for the first block; later blocks are whole blocks nearer
    rank = jnp.clip(jnp.round((first[..., None] - branch.q_positions) / w), 0, n - 1).astype(jnp.int32)
    moves = -w * jnp.arange(n, dtype=jnp.float32)[:, None]
    out, lse = block_table(
        positions.rotate(ctx.q_BTHd, jnp.swapaxes(first, 1, 2), ctx.length),
        ctx.keys_at(branch.k_positions)[0],
        ctx.v_BSKd,
        jnp.where((ids >= 0) & (starts >= 0), starts // w, -1).astype(jnp.int32),
        Listed(
            block_size=w,
            positions=jnp.where(index >= 0, last, -1),
            turn=jnp.broadcast_to(rank, ids.shape),
            angles=moves * positions.frequencies(d, ctx.length),
            scale=ctx.scale,
            softcap=softcap,
        ),
        _how(ctx),
    )
    return out, jnp.maximum(lse, NEG)
