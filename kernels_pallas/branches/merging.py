"""One softmax over disjoint sets of keys, from the softmax over each set and its log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.common import NEG


def merge(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The softmax over a union of disjoint key sets from each set's output and log-sum-exp.

    ``outs[i]``: ``[..., T, d]``, ``lses[i]``: float32 ``[..., T]`` (`NEG` or below where a set is empty).
    Differentiable in both; exact up to rounding. A row empty in every set yields 0 and `NEG`.
    """
    if len(outs) == 1:
        return outs[0], lses[0]
    stacked = jnp.stack(lses)
    top = jax.lax.stop_gradient(jnp.maximum(stacked.max(0), NEG))
    weights = jnp.exp(stacked - top)
    total = weights.sum(0)
    empty = top <= NEG / 2
    safe = jnp.where(empty, 1.0, total)
    shares = jnp.where(empty, 0.0, weights / safe)
    out = sum(s[..., None] * o.astype(jnp.float32) for s, o in zip(shares, outs, strict=True))
    return jnp.asarray(out).astype(outs[0].dtype), jnp.where(empty, NEG, top + jnp.log(safe))
