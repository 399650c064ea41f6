"""A cache of whole texts in blocks, with a summary of every complete block (LongHeads, arXiv 2402.10685)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lm.attention import blocks
from lm.attention.branches import Context, Tokens
from lm.caches.codec import Plain, codec
from lm.caches.layout import write
from lm.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlocksState:
    """Token i of a document lives in slot i, so block g in slots ``g * size …``; an index of -1 marks an empty slot.
    Keys are rotated to their `Summary.places`, which do not depend on where a pattern will put the block.
    `queries_BwHd`: the raw queries of the block being filled, by place in it, for its summary."""

    k_BCKd: Any
    v_BCKd: Any
    index_BC: jax.Array
    queries_BwHd: jax.Array
    summaries: jax.Array
    summary: Any = field(metadata={"static": True})
    rotated: bool = field(default=True, metadata={"static": True})
    codec: Any = field(default=Plain(), metadata={"static": True})
    fresh: bool = field(default=True, metadata={"static": True})
    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "k_BCKd": ("batch", None, "kv_heads", None),
        "v_BCKd": ("batch", None, "kv_heads", None),
        "index_BC": ("batch", None),
        "queries_BwHd": ("batch", None, "heads", None),
        "summaries": ("batch", None, "heads", None),
    }

    def places(self, tokens: Tokens) -> jax.Array:
        return jnp.asarray(self.summary.places(tokens.index_BT))

    def extend(self, k: jax.Array, v: jax.Array, tokens: Tokens) -> tuple[Any, jax.Array, jax.Array, Tokens]:
        """Puts T tokens in their slots; returns all slots, or the tokens themselves where they are the first."""
        index, size = tokens.index_BT, self.index_BC.shape[1]
        rows, slot = jnp.arange(index.shape[0])[:, None], jnp.where(index >= 0, index, size)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, slot].set(new.astype(old.dtype), mode="drop")

        new_k, new_v = self.codec.encode(k), self.codec.encode(v)
        made = write(
            lambda old, new: jax.tree.map(put, old, new),
            (self.k_BCKd, self.v_BCKd, self.index_BC),
            (new_k, new_v, index),
            index.max(),
        )
        state = dataclasses.replace(self, k_BCKd=made[0], v_BCKd=made[1], index_BC=made[2], fresh=False)
        places = self.summary.places
        if self.fresh and k.shape[1] > 1:
            own = dataclasses.replace(tokens, positions_BT=places(index))
            return state, self.codec.decode(new_k, k.dtype), self.codec.decode(new_v, v.dtype), own
        k, v = self.codec.decode(state.k_BCKd, k.dtype), self.codec.decode(state.v_BCKd, v.dtype)
        return state, k, v, Tokens(state.index_BC, places(state.index_BC), leading=size)

    def summarise(self, ctx: Context) -> tuple[BlocksState, Context]:
        """Summaries of the blocks that the newest tokens completed, and the table of all blocks for the pattern."""
        if ctx.keys.leading:
            state = self._completed(ctx)
            B, N = state.summaries.shape[:2]
            numbers = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
            seen = blocks.BlockTable(numbers * self.summary.size, numbers, None, state.summaries)
        else:
            seen = blocks.table(ctx, self.summary)
            N = self.summaries.shape[1]
            at = jnp.where(seen.numbers_BN >= 0, seen.numbers_BN, N)
            rows = jnp.arange(at.shape[0])[:, None]
            summaries = self.summaries.at[rows, at].set(seen.summaries.astype(self.summaries.dtype), mode="drop")
            state = dataclasses.replace(self, summaries=summaries, queries_BwHd=self._window(ctx)[0])
        return state, dataclasses.replace(ctx, blocks=seen)

    def _window(self, ctx: Context) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Raw queries of the block now being filled ``[B, w, H, d]``; of all blocks the new tokens touch, the one that
        was being filled first ``[B, c * w, H, d]``; the number of that first block ``[B]``; the last index ``[B]``."""
        w, index = self.summary.size, ctx.queries.index_BT
        B, T = index.shape
        last = index.max(1)
        first = jnp.where(last >= 0, jnp.min(jnp.where(index >= 0, index, last[:, None]), axis=1) // w, 0)
        c = -(-(w - 1 + T) // w)
        buffer = jnp.pad(self.queries_BwHd, ((0, 0), (0, (c - 1) * w), (0, 0), (0, 0)))
        at = jnp.where(index >= 0, index - first[:, None] * w, c * w)
        buffer = buffer.at[jnp.arange(B)[:, None], at].set(ctx.q_BTHd.astype(buffer.dtype), mode="drop")
        if c == 1:
            return buffer, buffer, first, last
        now = jnp.where(last >= 0, last // w - first, 0)
        filling = jnp.take_along_axis(buffer, (now[:, None] * w + jnp.arange(w))[:, :, None, None], axis=1)
        return filling, buffer, first, last

    def _completed(self, ctx: Context) -> BlocksState:
        w = self.summary.size
        filling, buffer, first, last = self._window(ctx)
        B, c = first.shape[0], buffer.shape[1] // w
        numbers = first[:, None] + jnp.arange(c)
        done = (last[:, None] >= 0) & ((numbers + 1) * w - 1 <= last[:, None])

        def write() -> jax.Array:
            assert ctx.v_BSKd is not None
            q = ctx.positions.rotate(buffer, jnp.tile(self.summary.places(jnp.arange(w)), c)[None, :, None], ctx.length)
            k, v = (blocks.take(x, numbers * w, w) for x in (ctx.k_BSKd, ctx.v_BSKd))
            new = self.summary.summarise(q.reshape(B, c, w, *q.shape[2:]), k, v, ctx.scale)
            at = jnp.where(done, numbers, self.summaries.shape[1])
            return self.summaries.at[jnp.arange(B)[:, None], at].set(new.astype(self.summaries.dtype), mode="drop")

        summaries = jax.lax.cond(done.any(), write, lambda: self.summaries)
        return dataclasses.replace(self, summaries=summaries, queries_BwHd=filling)


@dataclass(frozen=True)
class Blocks:
    """Room for the first `capacity` tokens of every row, in blocks that `summary` sums up for `n_heads` query heads;
    `quantize`: None or ``int8``, of keys and values (a step then decodes all of them)."""

    capacity: int = 2048
    n_heads: int = 1
    summary: Any = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UserError(f"cache.capacity: must be at least 1, found {self.capacity}")
        codec(self.quantize)

    def init(self, batch: int, n_kv_heads: int, head_dim: int, dtype: Any, rotated: bool = True) -> BlocksState:
        if self.summary is None or not rotated:
            raise UserError(
                "cache: block_memory needs a pattern with block summaries and positions of fixed frequencies"
            )
        n, kept = -(-self.capacity // self.summary.size), codec(self.quantize)
        slots = n * self.summary.size
        kv = kept.encode(jnp.zeros((batch, slots, n_kv_heads, head_dim), dtype))
        copy = jax.tree.map(jnp.copy, kv)  # two buffers, so that both may be donated
        queries = jnp.zeros((batch, self.summary.size, self.n_heads, head_dim), dtype)
        summaries = self.summary.zeros(batch, n, self.n_heads, head_dim, dtype)
        return BlocksState(
            kv, copy, jnp.full((batch, slots), -1, jnp.int32), queries, summaries, self.summary, codec=kept
        )
