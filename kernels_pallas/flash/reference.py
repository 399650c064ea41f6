"""The truth: all logits, one softmax, float32. Memory O(T S) per head; also what runs where there is no kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.common import NEG
from kernels_pallas.flash.problem import Scores


def attention(q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, scores: Scores) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]``."""
    rows, slopes_H, sinks_H, softcap = scores.rows, scores.slopes_H, scores.sinks_H, scores.softcap
    B, T, H, d = q_BTHd.shape
    S, K = k_BSKd.shape[1:3]
    q = q_BTHd.reshape(B, T, K, H // K, d)
    s = jnp.einsum("btkgd,bskd->bkgts", q, k_BSKd, preferred_element_type=jnp.float32) * scores.scale
    s = s.reshape(B, H, T, S)
    if slopes_H is not None:
        distance = rows["q_positions"][:, None, :, None] - rows["k_positions"][:, None, None, :]
        s = s - slopes_H[:, None, None] * distance
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    qi = rows.get("q_index", scores.offset + jnp.arange(T)[None])[:, :, None]
    ki = rows.get("k_index", jnp.arange(S)[None])[:, None, :]
    seen = scores.mask(qi, ki) & (qi >= 0) & (ki >= 0)
    if "q_segments" in rows:
        seen &= rows["q_segments"][:, :, None] == rows["k_segments"][:, None, :]
    s = jnp.where(seen[:, None], s, NEG)
    top = jnp.maximum(s.max(-1, keepdims=True), NEG / 2)
    if sinks_H is not None:
        top = jnp.maximum(top, sinks_H[:, None, None])
    top = jax.lax.stop_gradient(top)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    if sinks_H is not None:
        total = total + jnp.exp(sinks_H[:, None, None] - top)
    safe = jnp.where(total == 0, 1.0, total)
    p = (p / safe).astype(v_BSKd.dtype).reshape(B, K, H // K, T, S)
    out = jnp.einsum("bkgts,bskd->btkgd", p, v_BSKd).reshape(B, T, H, d)
    lse = jnp.where(total == 0, NEG, top + jnp.log(safe))[..., 0]
    return out, lse.swapaxes(1, 2)
