"""The full cache: every token of the text, in order of arrival."""

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
class FullState:
    """Slots are filled left to right; `used` counts them. An index of -1 marks an empty or padded slot."""

    k_BCKd: jax.Array
    v_BCKd: jax.Array
    index_BC: jax.Array
    positions_BC: jax.Array
    used: jax.Array
    rotated: bool = field(default=True, metadata={"static": True})

    def extend(self, k: jax.Array, v: jax.Array, tokens: Tokens) -> tuple[Any, jax.Array, jax.Array, Tokens]:
        """Appends T tokens (the caller sees to it that they fit) and returns all slots."""

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            at = (0, self.used) + (0,) * (old.ndim - 2)
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)

        state = dataclasses.replace(
            self,
            k_BCKd=put(self.k_BCKd, k),
            v_BCKd=put(self.v_BCKd, v),
            index_BC=put(self.index_BC, tokens.index_BT),
            positions_BC=put(self.positions_BC, tokens.positions_BT),
            used=self.used + k.shape[1],
        )
        return state, state.k_BCKd, state.v_BCKd, Tokens(state.index_BC, state.positions_BC)


@dataclass(frozen=True)
class Full:
    """Room for `capacity` tokens per row."""

    capacity: int = 2048

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UserError(f"cache.capacity: must be at least 1, found {self.capacity}")

    def init(self, batch: int, n_kv_heads: int, head_dim: int, dtype: Any, rotated: bool = True) -> FullState:
        kv = jnp.zeros((batch, self.capacity, n_kv_heads, head_dim), dtype)
        empty = jnp.full((batch, self.capacity), -1, jnp.int32)
        return FullState(kv, kv, empty, jnp.zeros(empty.shape), jnp.zeros((), jnp.int32), rotated)
