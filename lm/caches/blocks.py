"""A cache of whole texts in blocks, with a summary of every complete block (LongHeads, arXiv 2402.10685)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lm.attention import blocks
from lm.attention.branches import Context, Keys, Tokens
from lm.caches.base import Axes, Cache, State
from lm.caches.codec import Codec, Plain, Quantize, codec
from lm.caches.layout import write
from lm.errors import UserError
from lm.plug import Model


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlocksState(State):
    """Token i of a document lives in slot i, so block g in slots ``g * size …``; an index of -1 marks an empty slot.
    Keys are rotated to their `Summary.places`, which do not depend on where a pattern will put the block.
    `queries_BwHd`: the raw queries of the block being filled, by place in it, for its summary."""

    k_BCKd: Any
    v_BCKd: Any
    index_BC: jax.Array
    queries_BwHd: jax.Array
    summaries: jax.Array
    summary: blocks.Summary = field(metadata={"static": True})
    rotated: bool = field(default=True, metadata={"static": True})
    codec: Codec = field(default=Plain(), metadata={"static": True})
    fresh: bool = field(default=True, metadata={"static": True})
    AXES: ClassVar[Mapping[str, Axes]] = {
        "k_BCKd": ("batch", None, "kv_heads", None),
        "v_BCKd": ("batch", None, "kv_heads", None),
        "index_BC": ("batch", None),
        "queries_BwHd": ("batch", None, "heads", None),
        "summaries": ("batch", None, "heads", None),
    }

    def places(self, tokens: Tokens) -> jax.Array:
        return jnp.asarray(self.summary.places(tokens.index_BT))

    def begun(self) -> Self:
        return dataclasses.replace(self, fresh=False)

    def write(self, new: Keys) -> Self:
        """Each token in the slot of its index; padding in none."""
        return self._put(self.codec.encode(new.k_BSKd), self.codec.encode(new.v_BSKd), new.tokens.index_BT)

    def _put(self, k: Any, v: Any, index: jax.Array) -> Self:
        size = self.index_BC.shape[1]
        rows, slot = jnp.arange(index.shape[0])[:, None], jnp.where(index >= 0, index, size)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, slot].set(new.astype(old.dtype), mode="drop")

        made = write(
            lambda old, new: jax.tree.map(put, old, new),
            (self.k_BCKd, self.v_BCKd, self.index_BC),
            (k, v, index),
            index.max(),
        )
        return dataclasses.replace(self, k_BCKd=made[0], v_BCKd=made[1], index_BC=made[2], fresh=False)

    def read(self, new: Keys) -> tuple[Keys, ...]:
        """What `extend` gives; a block's keys lie side by side, so the slots are written to be read."""
        return self.extend(new)[1]

    def extend(self, new: Keys) -> tuple[Self, tuple[Keys, ...]]:
        """All slots, or the tokens themselves where they are the first."""
        k, v, dtype = self.codec.encode(new.k_BSKd), self.codec.encode(new.v_BSKd), new.k_BSKd.dtype
        state, places = self._put(k, v, new.tokens.index_BT), self.summary.places
        if self.fresh and new.k_BSKd.shape[1] > 1:
            own = dataclasses.replace(new.tokens, positions_BT=places(new.tokens.index_BT))
            k, v = self.codec.decode(k, dtype), self.codec.decode(v, dtype)
            return state, (Keys(k, v, own, self.rotated, k.shape[1]),)
        k, v = self.codec.decode(state.k_BCKd, dtype), self.codec.decode(state.v_BCKd, dtype)
        size = self.index_BC.shape[1]
        return state, (Keys(k, v, Tokens(state.index_BC, places(state.index_BC), leading=size), self.rotated),)

    def prepare(self, ctx: Context) -> tuple[Self, Context]:
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

    def noised(self, key: jax.Array) -> Self:
        """Equal summaries would send all heads to the same blocks."""
        noise = jax.random.normal(key, self.summaries.shape, self.summaries.dtype)
        return dataclasses.replace(self, summaries=noise)

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

    def _completed(self, ctx: Context) -> Self:
        w = self.summary.size
        filling, buffer, first, last = self._window(ctx)
        B, c = first.shape[0], buffer.shape[1] // w
        numbers = first[:, None] + jnp.arange(c)
        done = (last[:, None] >= 0) & ((numbers + 1) * w - 1 <= last[:, None])

        def write() -> jax.Array:
            q = ctx.positions.rotate(buffer, jnp.tile(self.summary.places(jnp.arange(w)), c)[None, :, None], ctx.length)
            k, v = (blocks.take(x, numbers * w, w) for x in (ctx.k_BSKd, ctx.v_BSKd))
            new = self.summary.summarise(q.reshape(B, c, w, *q.shape[2:]), k, v, ctx.scale)
            at = jnp.where(done, numbers, self.summaries.shape[1])
            return self.summaries.at[jnp.arange(B)[:, None], at].set(new.astype(self.summaries.dtype), mode="drop")

        summaries = jax.lax.cond(done.any(), write, lambda: self.summaries)
        return dataclasses.replace(self, summaries=summaries, queries_BwHd=filling)


@dataclass(frozen=True)
class BlockMemory(Cache):
    """Room for as many tokens of every row as are asked for, in blocks that the pattern's `Summary` sums up;
    `quantize`: None or ``int8``, of keys and values (a step then decodes all of them)."""

    quantize: Quantize | None = None

    def check(self, cfg: Model) -> None:
        if cfg.pattern.summary is None or cfg.positions.length_dependent:
            raise UserError(
                "model.cache: block_memory needs a pattern with block summaries and positions of fixed frequencies; "
                "valid: auto, full"
            )

    def init(self, cfg: Model, batch: int, capacity: int) -> BlocksState:
        self.check(cfg)
        summary: blocks.Summary = cfg.pattern.summary
        n, kept, H, d = -(-capacity // summary.size), codec(self.quantize), cfg.n_heads, cfg.head_width
        slots = n * summary.size
        kv = kept.encode(jnp.zeros((batch, slots, cfg.kv_heads, d), cfg.dtype))
        copy = jax.tree.map(jnp.copy, kv)  # two buffers, so that both may be donated
        queries = jnp.zeros((batch, summary.size, H, d), cfg.dtype)
        empty, summaries = jnp.full((batch, slots), -1, jnp.int32), summary.zeros(batch, n, H, d, cfg.dtype)
        return BlocksState(kv, copy, empty, queries, summaries, summary, codec=kept)
