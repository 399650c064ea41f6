"""A cache of constant size: the first tokens and a ring of the last ones (arXiv 2309.17453, 2308.16137)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lm.attention.branches import Tokens
from lm.caches.codec import Plain, codec
from lm.caches.layout import keys_in, keys_out, values_in, values_out, write
from lm.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SinkWindowState:
    """Slots ``0 … sinks - 1`` hold the first tokens; token i after them lives in ring slot
    ``sinks + (i - sinks) % window``. An index of -1 marks an empty slot."""

    k_BKCd: Any
    v_BKdC: Any
    index_BC: jax.Array
    positions_BC: jax.Array
    sinks: int = field(metadata={"static": True})
    rotated: bool = field(default=True, metadata={"static": True})
    codec: Any = field(default=Plain(), metadata={"static": True})
    fresh: bool = field(default=True, metadata={"static": True})
    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "k_BKCd": ("batch", "kv_heads", None, None),
        "v_BKdC": ("batch", "kv_heads", None, None),
        "index_BC": ("batch", None),
        "positions_BC": ("batch", None),
    }

    def extend(self, k: jax.Array, v: jax.Array, tokens: Tokens) -> tuple[Any, jax.Array, jax.Array, Tokens]:
        """One token replaces the oldest of the ring. A chunk sees the old ring *and* itself, then replaces."""
        new_k, new_v = self.codec.encode(k), self.codec.encode(v)
        state = self._put(new_k, new_v, tokens.index_BT, tokens.positions_BT)

        def read(stored: Any) -> jax.Array:
            return self.codec.decode(stored, k.dtype)

        if k.shape[1] == 1:
            kept = Tokens(state.index_BC, state.positions_BC, leading=self.sinks)
            return state, keys_out(read(state.k_BKCd)), values_out(read(state.v_BKdC)), kept
        if self.fresh:
            return state, read(new_k), read(new_v), tokens
        both_k = keys_out(jnp.concatenate([read(self.k_BKCd), read(keys_in(new_k))], axis=2))
        both_v = values_out(jnp.concatenate([read(self.v_BKdC), read(values_in(new_v))], axis=3))
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
        old = (self.k_BKCd, self.v_BKdC, self.index_BC, self.positions_BC)
        new = (keys_in(k), values_in(v), index, positions)
        put = _put_one if index.shape[1] == 1 else _put_many
        made = write(lambda o, n: put(o, n, slot, kept), old, new, last.max())
        keys, values, index, positions = made
        return dataclasses.replace(
            self, k_BKCd=keys, v_BKdC=values, index_BC=index, positions_BC=positions, fresh=False
        )


_AXES = (2, 3, 1, 1)  # of the slots, in keys, values, index and positions


def _put_one(old: Any, new: Any, slot_BT: jax.Array, kept_BT: jax.Array) -> Any:
    """One token per row, each to a slot of its own; in place."""

    def one(o: jax.Array, n: jax.Array, axis: int) -> jax.Array:
        def row(b: Any, o: jax.Array) -> jax.Array:
            at = [jnp.int32(0)] * o.ndim
            at[0], at[axis] = jnp.int32(b), slot_BT[b, 0]
            mine = jax.lax.dynamic_slice_in_dim(n, b, 1, 0).astype(o.dtype)
            there = jax.lax.dynamic_slice(o, at, mine.shape)
            return jax.lax.dynamic_update_slice(o, jnp.where(kept_BT[b, 0], mine, there), at)

        return row(0, o) if o.shape[0] == 1 else jax.lax.fori_loop(0, o.shape[0], row, o)

    return tuple(
        jax.tree.map(lambda x, y, axis=axis: one(x, y, axis), o, n) for o, n, axis in zip(old, new, _AXES, strict=True)
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
        jax.tree.map(lambda x, y, axis=axis: one(x, y, axis), o, n) for o, n, axis in zip(old, new, _AXES, strict=True)
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
        k, v = keys_in(kv), values_in(kv)
        return SinkWindowState(k, v, empty, jnp.zeros(empty.shape), self.sinks, rotated, kept)
