"""The truth: the logits of every branch side by side, one softmax over all of them, float32."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.branches.part import Part, Problem
from kernels_pallas.common import NEG


def union(parts: Sequence[Part], v_BSKd: jax.Array, T: int, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]``. Memory O(parts T S) per head."""
    sinks_H = problem.sinks_H
    tables = [_logits(part, T, problem) for part in parts]
    s = jnp.concatenate(tables, -1)
    B, H, S = s.shape[0], s.shape[1], v_BSKd.shape[1]
    v = jnp.repeat(v_BSKd.astype(jnp.float32), H // v_BSKd.shape[2], 2)
    top = jnp.maximum(s.max(-1), NEG / 2)
    if sinks_H is not None:
        top = jnp.maximum(top, sinks_H[:, None])
    top = jax.lax.stop_gradient(top)
    p = jnp.exp(s - top[..., None])
    total = p.sum(-1) if sinks_H is None else p.sum(-1) + jnp.exp(sinks_H[:, None] - top)
    safe = jnp.where(total == 0, 1.0, total)
    each = (p / safe[..., None]).reshape(B, H, T, len(parts), S).sum(3)
    out = jnp.einsum("bhts,bshd->bthd", each, v, precision="highest")
    lse = jnp.where(total == 0, NEG, top + jnp.log(safe))
    return out.astype(v_BSKd.dtype), lse.swapaxes(1, 2)


def _logits(part: Part, T: int, problem: Problem) -> jax.Array:
    """float32 ``[B, H, T, S]``, `NEG` where the branch does not see a key or has no such query."""
    slopes_H, softcap = problem.slopes_H, problem.softcap
    assert problem.scale is not None  # `api.branches` fills it in
    q, k = part.q_BTHd.astype(jnp.float32), part.k_BSKd.astype(jnp.float32)
    rows, H, S = q.shape[1], q.shape[2], k.shape[1]
    s = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, H // k.shape[2], 2), precision="highest") * problem.scale
    if slopes_H is not None:
        assert part.positions is not None
        q_at, k_at = part.positions
        s = s - slopes_H[:, None, None] * (q_at[:, None, :, None] - k_at[:, None, None, :])
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    q_index, k_index = part.index or (part.offset + jnp.arange(rows)[None], jnp.arange(S)[None])
    qi, ki = q_index[:, :, None], k_index[:, None, :]
    seen = part.mask(qi, ki) & (qi >= 0) & (ki >= 0)
    if part.segments is not None:
        seen &= part.segments[0][:, :, None] == part.segments[1][:, None, :]
    return jnp.pad(jnp.where(seen[:, None], s, NEG), ((0, 0), (0, 0), (T - rows, 0), (0, 0)), constant_values=NEG)
