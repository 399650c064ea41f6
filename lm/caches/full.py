"""The full cache: every token of the text, in order of arrival."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.attention.branches import Keys, Tokens
from lm.caches.base import Axes, Cache, State, no_summary
from lm.caches.codec import Codec, Plain, Quantize, codec
from lm.caches.layout import keys_in, keys_out, put_rows, values_in, values_out, write
from lm.plug import Model, bounded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullState(State):
    """Slots are filled left to right, each row by itself: `used_B` counts a row's tokens. An index of -1 marks an empty
    slot. `fresh`: nothing has been put in yet, so the first tokens need to look at nobody but each other."""

    k_BKCd: Any
    v_BKdC: Any
    index_BC: jax.Array
    positions_BC: jax.Array
    used_B: jax.Array
    rotated: bool = field(default=True, metadata={"static": True})
    codec: Codec = field(default=Plain(), metadata={"static": True})
    fresh: bool = field(default=True, metadata={"static": True})
    AXES: ClassVar[Mapping[str, Axes]] = {
        "k_BKCd": ("batch", "kv_heads", "slots", None),
        "v_BKdC": ("batch", "kv_heads", None, "slots"),
        "index_BC": ("batch", "slots"),
        "positions_BC": ("batch", "slots"),
        "used_B": ("batch",),
    }

    def begun(self) -> Self:
        return dataclasses.replace(self, fresh=False)

    def _read(self, dtype: DTypeLike) -> Keys:
        """Every slot."""
        k = keys_out(self.codec.decode(self.k_BKCd, dtype))
        v = values_out(self.codec.decode(self.v_BKdC, dtype))
        return Keys(k, v, Tokens(self.index_BC, self.positions_BC), self.rotated)

    def read(self, new: Keys) -> tuple[Keys, ...]:
        """All slots, and behind them the new tokens as the cache would keep them."""
        kept = self.codec
        k, v = (kept.decode(kept.encode(x), x.dtype) for x in (new.k_BSKd, new.v_BSKd))
        T = k.shape[1]
        if self.fresh:
            return (dataclasses.replace(new, k_BSKd=k, v_BSKd=v, rotated=self.rotated, new=T),)
        old = self._read(k.dtype)
        index = jnp.concatenate([self.index_BC, new.tokens.index_BT], axis=1)
        positions = jnp.concatenate([self.positions_BC, new.tokens.positions_BT], axis=1)
        k, v = (jnp.concatenate(pair, axis=1) for pair in ((old.k_BSKd, k), (old.v_BSKd, v)))
        return (Keys(k, v, Tokens(index, positions), self.rotated, T),)

    def write(self, new: Keys) -> Self:
        """Each row's tokens behind those that it has; the caller sees to it that they fit."""
        return self._put(self.codec.encode(new.k_BSKd), self.codec.encode(new.v_BSKd), new.tokens)

    def _put(self, k: Any, v: Any, tokens: Tokens) -> Self:
        live_BT = tokens.index_BT >= 0
        new = (k, v, tokens.index_BT, tokens.positions_BT)
        if live_BT.shape[1] > 1:  # padding, wherever it stands, goes behind a row's tokens, where the next ones land
            order = jnp.argsort(~live_BT, axis=1, stable=True)
            new = jax.tree.map(lambda x: jax.vmap(lambda row, at: row[at])(x, order), new)
        k, v, index, positions = new
        old = (self.k_BKCd, self.v_BKdC, self.index_BC, self.positions_BC)
        start_B = jnp.zeros_like(self.used_B) if self.fresh else self.used_B
        put = functools.partial(put_rows, start_B=start_B, together=self.fresh or start_B.shape[0] == 1)
        made = write(put, old, (keys_in(k), values_in(v), index, positions), self.used_B.max())
        used = self.used_B + live_BT.sum(1).astype(jnp.int32)
        names = ("k_BKCd", "v_BKdC", "index_BC", "positions_BC")
        return self.replace(**dict(zip(names, made, strict=True)), used_B=used, fresh=False)

    def extend(self, new: Keys) -> tuple[Self, tuple[Keys, ...]]:
        """As `write` and `read`; what is read are the slots just written, which is the memory of the cache itself."""
        k, v = self.codec.encode(new.k_BSKd), self.codec.encode(new.v_BSKd)
        state = self._put(k, v, new.tokens)
        if self.fresh and new.k_BSKd.shape[1] > 1:
            k, v = self.codec.decode(k, new.k_BSKd.dtype), self.codec.decode(v, new.v_BSKd.dtype)
            return state, (dataclasses.replace(new, k_BSKd=k, v_BSKd=v),)
        return state, (state._read(new.k_BSKd.dtype),)


@dataclass(frozen=True)
class Full(Cache):
    """Room for as many tokens per row as are asked for, or for `capacity`; `quantize`: None or ``int8``
    (`lm.caches.codec`)."""

    capacity: int | None = bounded(None, at_least=1)
    quantize: Quantize | None = None

    @property
    def room(self) -> int | None:
        return self.capacity

    def check(self, cfg: Model) -> None:
        no_summary(self, cfg)

    def init(self, cfg: Model, batch: int, capacity: int) -> FullState:
        capacity, kept = self.capacity or capacity, codec(self.quantize)
        kv = kept.encode(jnp.zeros((batch, capacity, cfg.kv_heads, cfg.head_width), cfg.dtype))
        empty = jnp.full((batch, capacity), -1, jnp.int32)
        k, v, used = keys_in(kv), values_in(kv), jnp.zeros(batch, jnp.int32)
        return FullState(k, v, empty, jnp.zeros(empty.shape), used, not cfg.positions.length_dependent, kept)
