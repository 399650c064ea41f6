"""A cache of constant size: the first tokens and a ring of the last ones (arXiv 2309.17453, 2308.16137)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.attention.branches import Keys, Tokens
from lm.caches.base import Axes, Cache, State, no_summary
from lm.caches.codec import Codec, Plain, Quantize, codec
from lm.caches.layout import AXES, keys_in, keys_out, values_in, values_out, write
from lm.plug import Model, bounded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SinkWindowState(State):
    """Slots ``0 … sinks - 1`` hold the first tokens; token i after them lives in ring slot
    ``sinks + (i - sinks) % window``. An index of -1 marks an empty slot."""

    k_BKCd: Any
    v_BKdC: Any
    index_BC: jax.Array
    positions_BC: jax.Array
    sinks: int = field(metadata={"static": True})
    rotated: bool = field(default=True, metadata={"static": True})
    codec: Codec = field(default=Plain(), metadata={"static": True})
    fresh: bool = field(default=True, metadata={"static": True})
    AXES: ClassVar[Mapping[str, Axes]] = {
        "k_BKCd": ("batch", "kv_heads", None, None),
        "v_BKdC": ("batch", "kv_heads", None, None),
        "index_BC": ("batch", None),
        "positions_BC": ("batch", None),
    }

    def begun(self) -> Self:
        return dataclasses.replace(self, fresh=False)

    def read(self, new: Keys) -> tuple[Keys, ...]:
        """The ring, and behind it the new tokens as the cache would keep them: a chunk sees the old ring and itself."""
        k, v, tokens = self.codec.encode(new.k_BSKd), self.codec.encode(new.v_BSKd), new.tokens
        return (self._read(k, v, tokens, new.k_BSKd.dtype),)

    def _read(self, k: Any, v: Any, tokens: Tokens, dtype: DTypeLike) -> Keys:
        def decoded(stored: Any) -> jax.Array:
            return self.codec.decode(stored, dtype)

        T = tokens.index_BT.shape[1]
        if self.fresh:
            return Keys(decoded(k), decoded(v), tokens, self.rotated, T)
        both_k = keys_out(jnp.concatenate([decoded(self.k_BKCd), decoded(keys_in(k))], axis=2))
        both_v = values_out(jnp.concatenate([decoded(self.v_BKdC), decoded(values_in(v))], axis=3))
        index = jnp.concatenate([self.index_BC, tokens.index_BT], axis=1)
        positions = jnp.concatenate([self.positions_BC, tokens.positions_BT], axis=1)
        return Keys(both_k, both_v, Tokens(index, positions), self.rotated, T)

    def write(self, new: Keys) -> Self:
        """Each token to its slot; of a chunk, the last ones."""
        return self._put(self.codec.encode(new.k_BSKd), self.codec.encode(new.v_BSKd), new.tokens)

    def extend(self, new: Keys) -> tuple[Self, tuple[Keys, ...]]:
        """One token replaces the oldest of the ring, and sees the slots just written. A chunk is read, then written."""
        k, v, dtype = self.codec.encode(new.k_BSKd), self.codec.encode(new.v_BSKd), new.k_BSKd.dtype
        state = self._put(k, v, new.tokens)
        if new.k_BSKd.shape[1] > 1:
            return state, (self._read(k, v, new.tokens, dtype),)
        kept = Tokens(state.index_BC, state.positions_BC, leading=self.sinks)
        k_BSKd = keys_out(self.codec.decode(state.k_BKCd, dtype))
        v_BSKd = values_out(self.codec.decode(state.v_BKdC, dtype))
        return state, (Keys(k_BSKd, v_BSKd, kept, self.rotated),)

    def _put(self, k: Any, v: Any, tokens: Tokens) -> Self:
        index, positions = tokens.index_BT, tokens.positions_BT
        size = self.index_BC.shape[1]
        window = size - self.sinks
        last = index.max(axis=1, keepdims=True)
        sink = index < self.sinks
        kept = (index >= 0) & (sink | (index > last - window))
        slot = jnp.where(sink, index, self.sinks + (index - self.sinks) % window)
        old = (self.k_BKCd, self.v_BKdC, self.index_BC, self.positions_BC)
        new = (keys_in(k), values_in(v), index, positions)
        put = _put_one if index.shape[1] == 1 else _put_many
        made = write(lambda o, n: put(o, n, slot, kept), old, new, last.max())
        keys, values, index, positions = made
        return dataclasses.replace(
            self, k_BKCd=keys, v_BKdC=values, index_BC=index, positions_BC=positions, fresh=False
        )


def _put_one(old: Any, new: Any, slot_BT: jax.Array, kept_BT: jax.Array) -> Any:
    """One token per row, each to a slot of its own; in place."""

    def one(o: jax.Array, n: jax.Array, axis: int) -> jax.Array:
        def row(b: int | jax.Array, o: jax.Array) -> jax.Array:
            at = [jnp.int32(0)] * o.ndim
            at[0], at[axis] = jnp.int32(b), slot_BT[b, 0]
            mine = jax.lax.dynamic_slice_in_dim(n, b, 1, 0).astype(o.dtype)
            there = jax.lax.dynamic_slice(o, at, mine.shape)
            return jax.lax.dynamic_update_slice(o, jnp.where(kept_BT[b, 0], mine, there), at)

        return row(0, o) if o.shape[0] == 1 else jax.lax.fori_loop(0, o.shape[0], row, o)

    return tuple(
        jax.tree.map(lambda x, y, axis=axis: one(x, y, axis), o, n) for o, n, axis in zip(old, new, AXES, strict=True)
    )


def _put_many(old: Any, new: Any, slot_BT: jax.Array, kept_BT: jax.Array) -> Any:
    """Many tokens per row: every slot looks up which of them comes to it, if any (a scatter would transpose all)."""
    B, T = slot_BT.shape
    size = old[2].shape[1]
    rows = jnp.arange(B)[:, None]
    source = jnp.full((B, size), -1, jnp.int32)
    source = source.at[rows, jnp.where(kept_BT, slot_BT, size)].set(jnp.arange(T, dtype=jnp.int32), mode="drop")

    def one(o: jax.Array, n: jax.Array, axis: int) -> jax.Array:
        at = source.reshape(B, *(size if i == axis else 1 for i in range(1, o.ndim)))
        taken = jnp.take_along_axis(n.astype(o.dtype), jnp.maximum(at, 0), axis)
        return jnp.where(at >= 0, taken, o)

    return tuple(
        jax.tree.map(lambda x, y, axis=axis: one(x, y, axis), o, n) for o, n, axis in zip(old, new, AXES, strict=True)
    )


@dataclass(frozen=True)
class SinkWindow(Cache):
    """Room for `sinks` first tokens and the last `window` tokens per row; `quantize`: None or ``int8``."""

    sinks: int = bounded(4, at_least=0)
    window: int = bounded(1024, at_least=1)
    quantize: Quantize | None = None

    def check(self, cfg: Model) -> None:
        no_summary(self, cfg)

    def init(self, cfg: Model, batch: int, capacity: int) -> SinkWindowState:
        size, kept = self.sinks + self.window, codec(self.quantize)
        kv = kept.encode(jnp.zeros((batch, size, cfg.kv_heads, cfg.head_width), cfg.dtype))
        empty = jnp.full((batch, size), -1, jnp.int32)
        k, v, rotated = keys_in(kv), values_in(kv), not cfg.positions.length_dependent
        return SinkWindowState(k, v, empty, jnp.zeros(empty.shape), self.sinks, rotated, kept)
