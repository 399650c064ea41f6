"""A cache of constant size: the first tokens and a ring of the last ones (arXiv 2309.17453, 2308.16137)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lm.attention.branches import Tokens
from lm.caches.codec import Plain, codec
from lm.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SinkWindowState:
    """Slots ``0 … sinks - 1`` hold the first tokens; token i after them lives in ring slot
    ``sinks + (i - sinks) % window``. An index of -1 marks an empty slot."""

    k_BCKd: Any
    v_BCKd: Any
    index_BC: jax.Array
    positions_BC: jax.Array
    sinks: int = field(metadata={"static": True})
    rotated: bool = field(default=True, metadata={"static": True})
    codec: Any = field(default=Plain(), metadata={"static": True})
    fresh: bool = field(default=True, metadata={"static": True})

    def extend(self, k: jax.Array, v: jax.Array, tokens: Tokens) -> tuple[Any, jax.Array, jax.Array, Tokens]:
        """One token replaces the oldest of the ring. A chunk sees the old ring *and* itself, then replaces."""
        new_k, new_v = self.codec.encode(k), self.codec.encode(v)
        state = self._put(new_k, new_v, tokens.index_BT, tokens.positions_BT)

        def read(stored: Any) -> jax.Array:
            return self.codec.decode(stored, k.dtype)

        if k.shape[1] == 1:
            kept = Tokens(state.index_BC, state.positions_BC, leading=self.sinks)
            return state, read(state.k_BCKd), read(state.v_BCKd), kept
        if self.fresh:
            return state, read(new_k), read(new_v), tokens
        both_k = jnp.concatenate([read(self.k_BCKd), read(new_k)], axis=1)
        both_v = jnp.concatenate([read(self.v_BCKd), read(new_v)], axis=1)
        index = jnp.concatenate([self.index_BC, tokens.index_BT], axis=1)
        positions = jnp.concatenate([self.positions_BC, tokens.positions_BT], axis=1)
        return state, both_k, both_v, Tokens(index, positions)

    def _put(self, k: Any, v: Any, index: jax.Array, positions: jax.Array) -> SinkWindowState:
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
            k_BCKd=jax.tree.map(put, self.k_BCKd, k),
            v_BCKd=jax.tree.map(put, self.v_BCKd, v),
            index_BC=put(self.index_BC, index),
            positions_BC=put(self.positions_BC, positions),
            fresh=False,
        )


@dataclass(frozen=True)
class SinkWindow:
    """Room for `sinks` first tokens and the last `window` tokens per row; `quantize`: None or ``int8``."""

    sinks: int = 4
    window: int = 1024
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise UserError(f"cache: window must be at least 1 and sinks at least 0, found {self}")
        codec(self.quantize)

    def init(self, batch: int, n_kv_heads: int, head_dim: int, dtype: Any, rotated: bool = True) -> SinkWindowState:
        size = self.sinks + self.window
        kept = codec(self.quantize)
        kv = kept.encode(jnp.zeros((batch, size, n_kv_heads, head_dim), dtype))
        empty = jnp.full((batch, size), -1, jnp.int32)
        copy = jax.tree.map(jnp.copy, kv)  # two buffers, so that both may be donated
        return SinkWindowState(kv, copy, empty, jnp.zeros(empty.shape), self.sinks, rotated, kept)
