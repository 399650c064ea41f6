"""The reference backend: all logits of all branches, one softmax. Memory O(T S) per head; the truth for the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.attention.backends.listed import direct
from lm.attention.branches import NEG, AnyBranch, BlockBranch, Branch, Context, chosen


def reach(branch: Branch, ctx: Context) -> int:
    """How many leading key slots hold all that the branch can see."""
    bound, S = branch.mask.key_bound, ctx.k_BSKd.shape[1]
    known = S if ctx.keys.contiguous else ctx.keys.leading
    return min(bound, S) if bound is not None and bound <= known else S


def visible(branch: Branch, ctx: Context, n_keys: int | None = None) -> jax.Array:
    """bool ``[B, T, n_keys]``: the branch's mask with padding and segments applied."""
    q, k = ctx.queries, ctx.keys
    qi, ki = q.index_BT[:, :, None], k.index_BT[:, None, :n_keys]
    seen = branch.mask(qi, ki) & (ki >= 0) & (qi >= 0)
    if q.segments_BT is not None and k.segments_BT is not None:
        seen &= q.segments_BT[:, :, None] == k.segments_BT[:, None, :n_keys]
    if q.ancestors_BTT is not None and ctx.sources[0].new:
        seen &= _on_the_way(q.ancestors_BTT, ctx.k_BSKd.shape[1])[..., :n_keys]
    if isinstance(branch.rows, int):
        seen &= (jnp.arange(qi.shape[1]) >= qi.shape[1] - branch.rows)[None, :, None]
    return seen


def _on_the_way(ancestors_BTT: jax.Array, n_keys: int) -> jax.Array:
    """bool ``[B, T, n_keys]``: all before the new tokens, which are the last T keys; of these the ancestors."""
    T = ancestors_BTT.shape[1]
    return jnp.pad(ancestors_BTT, ((0, 0), (0, 0), (n_keys - T, 0)), constant_values=True)


def logits(branch: Branch, ctx: Context, softcap: float | None, n_keys: int | None = None) -> jax.Array:
    """float32 ``[B, K, G, T, n_keys]`` logits of every pair at the branch's positions, mask not applied."""
    B, T, H, d = ctx.q_BTHd.shape
    K = ctx.k_BSKd.shape[2]
    (q, qp), (k, kp) = ctx.queries_at(branch.q_positions), ctx.keys_at(branch.k_positions, n_keys)
    q = q.reshape(B, T, K, H // K, d)
    s = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * ctx.scale
    bias = ctx.positions.bias(qp, kp, H)
    if bias is not None:
        s = s + bias.reshape(B, K, H // K, T, -1)
    return s if softcap is None else softcap * jnp.tanh(s / softcap)


def gathered(branch: Branch, ctx: Context, softcap: float | None) -> tuple[jax.Array, ...]:
    """Logits float32 ``[B, H, T, n]`` (masked to `NEG`) and values ``[B, H, T, n, d]`` of a gathering branch."""
    assert branch.gather_BHTn is not None
    ids = branch.gather_BHTn
    B, H, T, n = ids.shape
    which = T if branch.rows is None else branch.rows
    K = ctx.k_BSKd.shape[2]
    slot = jnp.maximum(ids, 0)
    rows, kv = jnp.arange(B)[:, None, None, None], (jnp.arange(H) // (H // K))[None, :, None, None]
    (q, own_q), (k, own_k) = ctx.queries_at(branch.q_positions, which), ctx.keys_at(branch.k_positions)
    k, v, own_k = k[rows, slot, kv], ctx.v_BSKd[rows, slot, kv], own_k[rows, slot]
    s = jnp.einsum("bthd,bhtnd->bhtn", q, k, preferred_element_type=jnp.float32) * ctx.scale
    bias = ctx.positions.bias(own_q[:, None, :, None], own_k, H)
    if bias is not None:  # [B, H, T, H', 1, n], of which a head wants its own
        s = s + jnp.moveaxis(jnp.diagonal(bias[..., 0, :], axis1=1, axis2=3), -1, 1)
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    k_index = ctx.keys.index_BT[rows, slot]
    seen = (ids >= 0) & branch.mask(chosen(ctx.queries.index_BT, which)[:, None, :, None], k_index)
    return jnp.where(seen, s, NEG), v


def spread(x_BHrx: jax.Array, rows: int | jax.Array | None, T: int, fill: float = 0) -> jax.Array:
    """``[B, H, T, …]``: what was computed for the queries of `rows` (`Branch.rows`) in their places, else `fill`."""
    if not isinstance(rows, jax.Array):
        widths = [(0, 0), (0, 0), (T - x_BHrx.shape[2], 0)] + [(0, 0)] * (x_BHrx.ndim - 3)
        return jnp.pad(x_BHrx, widths, constant_values=fill)
    at = jnp.where(rows < 0, T, rows)
    empty = jnp.full((*x_BHrx.shape[1:2], T, *x_BHrx.shape[3:]), fill, x_BHrx.dtype)
    return jax.vmap(lambda x, at: empty.at[:, at].set(x, mode="drop"))(x_BHrx, at)


def attend(ctx: Context, branches: tuple[AnyBranch, ...], softcap: float | None) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]``; rows without any key give 0 and `NEG`."""
    B, T, H, d = ctx.q_BTHd.shape
    K = ctx.k_BSKd.shape[2]
    S = ctx.k_BSKd.shape[1]
    v_BSKd = ctx.v_BSKd
    shared = jnp.full((B, K, H // K, T, S), NEG, jnp.float32)
    extra: list[tuple[jax.Array, jax.Array]] = []
    others: list[tuple[jax.Array, jax.Array]] = []
    if all(isinstance(branch, BlockBranch) for branch in branches):
        S, shared = 0, shared[..., :0]  # keys are reached through their blocks alone
    for branch in branches:
        if isinstance(branch, BlockBranch):
            s, v = direct(branch, ctx, softcap)
            extra.append((s.reshape(B, K, H // K, T, -1), v.reshape(B, K, H // K, T, -1, d)))
        elif branch.source:
            own = ctx.of(branch)
            seen = visible(branch, own)[:, None, None]
            others.append((jnp.where(seen, logits(branch, own, softcap), NEG), own.v_BSKd))
        elif branch.gather_BHTn is None:
            # Branches are disjoint, so each pair takes its logit from the one branch that sees it.
            n = reach(branch, ctx)
            seen = visible(branch, ctx, n)[:, None, None]
            part = jnp.where(seen, logits(branch, ctx, softcap, n), shared[..., :n])
            shared = part if n == S else shared.at[..., :n].set(part)
        else:
            s, v = gathered(branch, ctx, softcap)
            s, v = spread(s, branch.rows, T, NEG), spread(v, branch.rows, T)
            extra.append((s.reshape(B, K, H // K, T, -1), v.reshape(B, K, H // K, T, -1, d)))
    s = jnp.concatenate([shared] + [e[0] for e in (*extra, *others)], axis=-1)
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    p = jnp.where(s <= NEG / 2, 0.0, jnp.exp(s - top))
    total = p.sum(-1, keepdims=True)
    empty = total == 0
    p = (p / jnp.where(empty, 1.0, total)).astype(v_BSKd.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", p[..., :S], v_BSKd[:, :S])
    at = S
    for _, v in extra:
        out += jnp.einsum("bkgtn,bkgtnd->btkgd", p[..., at : at + v.shape[-2]], v)
        at += v.shape[-2]
    for _, v in others:
        out += jnp.einsum("bkgts,bskd->btkgd", p[..., at : at + v.shape[1]], v)
        at += v.shape[1]
    lse = jnp.where(empty, NEG, top + jnp.log(jnp.where(empty, 1.0, total)))[..., 0]
    return out.reshape(B, T, H, d), jnp.moveaxis(lse.reshape(B, H, T), 1, 2)
