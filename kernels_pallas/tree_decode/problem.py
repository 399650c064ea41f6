"""What `tree_decode` computes of queries and a cache: a caller's problem, and the same without gaps."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from kernels_pallas.common import STATIC, known_dtype
from kernels_pallas.tree_decode.masks import unpack_mask
from lm.errors import UserError

NAME = "tree_decode"
NODES = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """What is valid of the cache, and the tree; a pytree of its arrays.

    `lengths` [B]: of a row's cache the first so many slots are valid (more than S counts as S). Other slots may hold
    anything. `new_k`, `new_v` [B, N, K, d]: of the nodes, not in the cache yet.

    `ancestors`: bool [N, N], row i marks the nodes i sees, itself among them (``masks.ancestors_of``); or the same as
    bits, uint32 [N, ceil(N / 32)] (``masks.pack_mask``). With a leading B there is one for each row.

    `scale` of the scores: 1 / sqrt(d) if None.
    """

    lengths: jax.Array
    new_k: jax.Array
    new_v: jax.Array
    ancestors: jax.Array
    scale: float | None = field(default=None, metadata=STATIC)

    def filled(self, q: jax.Array, k: jax.Array, v: jax.Array) -> Filled:
        """For these queries and this cache. Raises UserError for what does not fit them."""
        known_dtype(NAME, q=q, k=k, v=v, new_k=self.new_k, new_v=self.new_v)
        if q.ndim != 4 or k.ndim != 4:
            raise UserError(f"{NAME}: q {q.shape}, k {k.shape}; valid: q [B, N, H, d], k [B, K, S, d]")
        B, N, H, d = q.shape
        K, S = k.shape[1:3]
        if k.shape != (B, K, S, d) or v.shape != k.shape or H % K or not S:
            raise UserError(
                f"{NAME}: q {q.shape}, k {k.shape}, v {v.shape}; valid: k and v [{B}, K, S, {d}], K a divisor of {H}"
            )
        if not 1 <= N <= NODES:
            raise UserError(f"{NAME}: {N} nodes; valid: 1 to {NODES}")
        self._check(B, N, K, d)
        ancestors = self.ancestors
        mask = unpack_mask(ancestors) if ancestors.dtype == jnp.uint32 else ancestors
        mask = mask if mask.ndim == 3 else mask[None]
        scale = d**-0.5 if self.scale is None else float(self.scale)
        return Filled(self.lengths, self.new_k, self.new_v, mask, scale)

    def _check(self, B: int, N: int, K: int, d: int) -> None:
        new_k, new_v, lengths, ancestors = self.new_k, self.new_v, self.lengths, self.ancestors
        if new_k.shape != (B, N, K, d) or new_v.shape != (B, N, K, d):
            raise UserError(f"{NAME}: new_k {new_k.shape}, new_v {new_v.shape}; valid: {(B, N, K, d)}")
        if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise UserError(f"{NAME}: lengths {lengths.dtype}{list(lengths.shape)}; valid: an integer per row, [{B}]")
        packed = ancestors.dtype == jnp.uint32
        width = -(-N // 32) if packed else N
        if ancestors.shape not in ((N, width), (1, N, width), (B, N, width)) or not (
            packed or ancestors.dtype == jnp.bool_
        ):
            raise UserError(
                f"{NAME}: ancestors {ancestors.dtype}{list(ancestors.shape)}; valid: bool [{N}, {N}] or uint32 [{N}, "
                f"{-(-N // 32)}], or one for each of {B} rows"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filled:
    """A `Problem` as every implementation takes it; a pytree of its arrays. `mask` is bool [B or 1, N, N]."""

    lengths: jax.Array
    new_k: jax.Array
    new_v: jax.Array
    mask: jax.Array
    scale: float = field(metadata=STATIC)
