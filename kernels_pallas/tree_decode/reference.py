"""Attention of a tree of draft nodes against a cache and against each other: the truth, the form for XLA.

Letters: B rows, N nodes, S slots of the cache, H query heads, K key heads (H = K * G), d head width.

A node attends to the first `lengths[b]` slots of its row's cache and to the nodes that `ancestors` marks, itself among
them (SpecInfer, arXiv 2305.09781, section 4.2; Medusa, 2401.10774, section 3.1.2). Keys of the nodes come separately:
they enter the cache when the accepted path is known. Positions belong to whoever rotates the keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.common import NEG
from kernels_pallas.tree_decode.problem import Filled

CHUNK = 2048


def reference(q_BNHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, problem: Filled) -> tuple[jax.Array, jax.Array]:
    """One softmax over cache and tree in float32 -> output [B, N, H, d] as `q`, log-sum-exp float32 [B, N, H].

    A node without any key has output 0 and log-sum-exp -inf.
    """
    B, N, H, d = q_BNHd.shape
    K, S = k_BKSd.shape[1:3]
    highest = jax.lax.Precision.HIGHEST
    live = jnp.arange(S) < problem.lengths[:, None]
    keys = jnp.concatenate([k_BKSd, jnp.swapaxes(problem.new_k, 1, 2)], axis=2).astype(jnp.float32)
    cached = jnp.where(live[:, None, :, None], v_BKSd, 0)
    values = jnp.concatenate([cached, jnp.swapaxes(problem.new_v, 1, 2)], axis=2).astype(jnp.float32)
    seen = jnp.concatenate(
        [jnp.broadcast_to(live[:, None], (B, N, S)), jnp.broadcast_to(problem.mask, (B, N, N))], axis=2
    )[:, :, None, None]
    q = q_BNHd.astype(jnp.float32).reshape(B, N, K, H // K, d)
    scores = jnp.where(seen, problem.scale * jnp.einsum("bnkgd,bksd->bnkgs", q, keys, precision=highest), -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), NEG)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bnkgs,bksd->bnkgd", weights, values, precision=highest) / jnp.where(total > 0, total, 1.0)
    lse = (top + jnp.log(total))[..., 0]
    return out.reshape(B, N, H, d).astype(q_BNHd.dtype), lse.reshape(B, N, H)


def xla(
    q_BNHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, problem: Filled, *, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """The same in XLA operations: chunks of the cache with a running softmax, as many as the longest row needs."""
    B, N, H, d = q_BNHd.shape
    K, S = k_BKSd.shape[1:3]
    G = H // K
    dtype, precision = q_BNHd.dtype, jax.lax.Precision.HIGHEST if q_BNHd.dtype == jnp.float32 else None
    q = q_BNHd.reshape(B, N, K, G, d).transpose(0, 2, 3, 1, 4)  # [B, K, G, N, d]
    chunk = min(chunk, S)

    def dot(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)

    State = tuple[jax.Array, jax.Array, jax.Array]

    def add(state: State, k: jax.Array, v: jax.Array, seen: jax.Array) -> State:
        """Keys [B, K, s, d] that `seen` [B, 1, 1, N or 1, s] admits join the softmax."""
        top, total, out = state
        scores = jnp.where(seen, problem.scale * dot("bkgnd,bksd->bkgns", q, k), NEG)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(top - higher)
        out = out * shrink[..., None] + dot("bkgns,bksd->bkgnd", weights.astype(dtype), v)
        return higher, total * shrink + jnp.sum(weights, axis=-1), out

    def body(i: jax.Array, state: State) -> State:
        start = jnp.minimum(i * chunk, S - chunk)  # the last chunk overlaps the one before; its slots count once
        slot = start + jnp.arange(chunk)
        live = (slot >= i * chunk) & (slot < problem.lengths[:, None])
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=2) for x in (k_BKSd, v_BKSd))
        return add(state, k, jnp.where(live[:, None, :, None], v, 0), live[:, None, None, None])

    zero = jnp.zeros((B, K, G, N), jnp.float32)
    state = add(
        (zero + NEG, zero, jnp.zeros((B, K, G, N, d), jnp.float32)),
        jnp.swapaxes(problem.new_k, 1, 2),
        jnp.swapaxes(problem.new_v, 1, 2),
        problem.mask[:, None, None],
    )
    chunks = (jnp.minimum(jnp.max(problem.lengths), S) + chunk - 1) // chunk
    top, total, out = jax.lax.fori_loop(0, chunks, body, state)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, N, H, d).astype(dtype), lse.transpose(0, 3, 1, 2).reshape(B, N, H)
