"""Which nodes of a tree see which: bool masks, and the same as bits. N: nodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.jit
def ancestors_of(parents_N: jax.Array) -> jax.Array:
    """bool [N, N]: row i marks node i and its ancestors. A parent comes before its children; a root has parent -1."""
    N = parents_N.shape[0]
    own = jnp.eye(N, dtype=bool)

    def body(i: jax.Array, seen: jax.Array) -> jax.Array:
        parent = parents_N[i]
        return seen.at[i].set(own[i] | jnp.where(parent >= 0, seen[parent], False))

    return jax.lax.fori_loop(0, N, body, own)


@jax.jit
def pack_mask(mask: jax.Array) -> jax.Array:
    """bool [..., N, N] -> uint32 [..., N, ceil(N / 32)]: key j is bit ``j % 32`` of word ``j // 32``."""
    N = mask.shape[-1]
    bits = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -N % 32)]).reshape(*mask.shape[:-1], -1, 32)
    return jnp.sum(bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


@jax.jit
def unpack_mask(words: jax.Array) -> jax.Array:
    """uint32 [..., N, ceil(N / 32)] -> bool [..., N, N]."""
    N = words.shape[-2]
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :N].astype(bool)
