"""The full cache: every token of the text, in order of arrival."""

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
class FullState:
    """Slots are filled left to right; `used` counts them. An index of -1 marks an empty or padded slot. `fresh`:
    nothing has been put in yet, so the first tokens need to look at nobody but each other."""

    k_BCKd: Any
    v_BCKd: Any
    index_BC: jax.Array
    positions_BC: jax.Array
    used: jax.Array
    rotated: bool = field(default=True, metadata={"static": True})
    codec: Any = field(default=Plain(), metadata={"static": True})
    fresh: bool = field(default=True, metadata={"static": True})

    def extend(self, k: jax.Array, v: jax.Array, tokens: Tokens) -> tuple[Any, jax.Array, jax.Array, Tokens]:
        """Appends T tokens (the caller sees to it that they fit) and returns all slots."""

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            at = (0, self.used) + (0,) * (old.ndim - 2)
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)

        new_k, new_v = self.codec.encode(k), self.codec.encode(v)
        state = dataclasses.replace(
            self,
            k_BCKd=jax.tree.map(put, self.k_BCKd, new_k),
            v_BCKd=jax.tree.map(put, self.v_BCKd, new_v),
            index_BC=put(self.index_BC, tokens.index_BT),
            positions_BC=put(self.positions_BC, tokens.positions_BT),
            used=self.used + k.shape[1],
            fresh=False,
        )
        if self.fresh and k.shape[1] > 1:
            return state, self.codec.decode(new_k, k.dtype), self.codec.decode(new_v, v.dtype), tokens
        k, v = self.codec.decode(state.k_BCKd, k.dtype), self.codec.decode(state.v_BCKd, v.dtype)
        return state, k, v, Tokens(state.index_BC, state.positions_BC)


@dataclass(frozen=True)
class Full:
    """Room for `capacity` tokens per row; `quantize`: None or ``int8`` (`lm.caches.codec`)."""

    capacity: int = 2048
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UserError(f"cache.capacity: must be at least 1, found {self.capacity}")
        codec(self.quantize)

    def init(self, batch: int, n_kv_heads: int, head_dim: int, dtype: Any, rotated: bool = True) -> FullState:
        kept = codec(self.quantize)
        kv = kept.encode(jnp.zeros((batch, self.capacity, n_kv_heads, head_dim), dtype))
        empty = jnp.full((batch, self.capacity), -1, jnp.int32)
        copy = jax.tree.map(jnp.copy, kv)  # two buffers, so that both may be donated
        return FullState(kv, copy, empty, jnp.zeros(empty.shape), jnp.zeros((), jnp.int32), rotated, kept)
