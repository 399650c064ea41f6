"""A cache of constant size: the first tokens and a ring of the last ones (arXiv 2309.17453, 2308.16137)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lm.attention.branches import Tokens
from lm.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SinkWindowState:
    """Slots ``0 … sinks - 1`` hold the first tokens; token i after them lives in ring slot
    ``sinks + (i - sinks) % window``. An index of -1 marks an empty slot."""

    k_BCKd: jax.Array
    v_BCKd: jax.Array
    index_BC: jax.Array
    positions_BC: jax.Array
    sinks: int = field(metadata={"static": True})
    rotated: bool = field(default=True, metadata={"static": True})

    def extend(self, k: jax.Array, v: jax.Array, tokens: Tokens) -> tuple[Any, jax.Array, jax.Array, Tokens]:
        """One token replaces the oldest of the ring. A chunk sees the old ring *and* itself, then replaces."""
        new = (k, v, tokens.index_BT, tokens.positions_BT)
        old = (self.k_BCKd, self.v_BCKd, self.index_BC, self.positions_BC)
        state = self._put(*new)
        if k.shape[1] == 1:
            return state, state.k_BCKd, state.v_BCKd, Tokens(state.index_BC, state.positions_BC, leading=self.sinks)
        both = [jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(old, new, strict=True)]
        return state, both[0], both[1], Tokens(both[2], both[3])

    def _put(self, k: jax.Array, v: jax.Array, index: jax.Array, positions: jax.Array) -> SinkWindowState:
        size = self.index_BC.shape[1]
        window = size - self.sinks
        last = index.max(axis=1, keepdims=True)
        sink = index < self.sinks
        kept = (index >= 0) & (sink | (index > last - window))
        slot = jnp.where(sink, index, self.sinks + (index - self.sinks) % window)
        slot = jnp.where(kept, slot, size)  # out of bounds: dropped by the scatter
        rows = jnp.arange(index.shape[0])[:, None]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, slot].set(new.astype(old.dtype), mode="drop")

        return dataclasses.replace(
            self,
            k_BCKd=put(self.k_BCKd, k),
            v_BCKd=put(self.v_BCKd, v),
            index_BC=put(self.index_BC, index),
            positions_BC=put(self.positions_BC, positions),
        )


@dataclass(frozen=True)
class SinkWindow:
    """Room for `sinks` first tokens and the last `window` tokens per row."""

    sinks: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise UserError(f"cache: window must be at least 1 and sinks at least 0, found {self}")

    def init(self, batch: int, n_kv_heads: int, head_dim: int, dtype: Any, rotated: bool = True) -> SinkWindowState:
        size = self.sinks + self.window
        kv = jnp.zeros((batch, size, n_kv_heads, head_dim), dtype)
        empty = jnp.full((batch, size), -1, jnp.int32)
        return SinkWindowState(kv, kv, empty, jnp.zeros(empty.shape), self.sinks, rotated)
