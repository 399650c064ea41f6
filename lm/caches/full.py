"""The full cache: every token of the text, in order of arrival."""

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
class FullState:
    """Slots are filled left to right; `used` counts them. An index of -1 marks an empty or padded slot. `fresh`:
    nothing has been put in yet, so the first tokens need to look at nobody but each other."""

    k_BKCd: Any
    v_BKdC: Any
    index_BC: jax.Array
    positions_BC: jax.Array
    used: jax.Array
    rotated: bool = field(default=True, metadata={"static": True})
    codec: Any = field(default=Plain(), metadata={"static": True})
    fresh: bool = field(default=True, metadata={"static": True})
    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "k_BKCd": ("batch", "kv_heads", "slots", None),
        "v_BKdC": ("batch", "kv_heads", None, "slots"),
        "index_BC": ("batch", "slots"),
        "positions_BC": ("batch", "slots"),
    }

    def extend(self, k: jax.Array, v: jax.Array, tokens: Tokens) -> tuple[Any, jax.Array, jax.Array, Tokens]:
        """Appends T tokens (the caller sees to it that they fit) and returns all slots."""

        def put(old: Any, new: Any) -> Any:
            axes = (2, 3, 1, 1)
            return tuple(
                jax.tree.map(lambda o, n, axis=axis: _update(o, n, self.used, axis), o, n)
                for o, n, axis in zip(old, new, axes, strict=True)
            )

        new_k, new_v = self.codec.encode(k), self.codec.encode(v)
        old = (self.k_BKCd, self.v_BKdC, self.index_BC, self.positions_BC)
        new = (keys_in(new_k), values_in(new_v), tokens.index_BT, tokens.positions_BT)
        keys, values, index, positions = write(put, old, new, self.used)
        state = dataclasses.replace(
            self,
            k_BKCd=keys,
            v_BKdC=values,
            index_BC=index,
            positions_BC=positions,
            used=self.used + k.shape[1],
            fresh=False,
        )
        if self.fresh and k.shape[1] > 1:
            return state, self.codec.decode(new_k, k.dtype), self.codec.decode(new_v, v.dtype), tokens
        k = keys_out(self.codec.decode(state.k_BKCd, k.dtype))
        v = values_out(self.codec.decode(state.v_BKdC, v.dtype))
        return state, k, v, Tokens(state.index_BC, state.positions_BC)


def _update(old: jax.Array, new: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis)


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
        k, v = keys_in(kv), values_in(kv)
        return FullState(k, v, empty, jnp.zeros(empty.shape), jnp.zeros((), jnp.int32), rotated, kept)
