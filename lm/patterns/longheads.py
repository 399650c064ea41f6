"""LongHeads: every head picks the chunks it needs, renumbered into the trained range (arXiv 2402.10685, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.attention.blocks import BlockTable, Summary, pick, rank_positions, table
from lm.attention.branches import AnyBranch, BlockBranch, Branch, Context
from lm.attention.masks import Causal, EarlyQueries, Mask, NearChunks, Sinks, Window
from lm.errors import UserError
from lm.patterns.base import Pattern, Picks
from lm.plug import Model


@dataclass(frozen=True)
class ChunkFeature(Summary):
    """The two-stage vector of a chunk, per query head (section 3.1): attention within the chunk, both ways, at
    positions 0 … size - 1; the mean of its outputs as a query over the same keys; the mix of those keys it gives."""

    size: int

    def places(self, index: jax.Array) -> jax.Array:
        return (index % self.size).astype(jnp.float32)

    def zeros(self, batch: int, n: int, n_heads: int, head_dim: int, dtype: DTypeLike) -> jax.Array:
        return jnp.zeros((batch, n, n_heads, head_dim), dtype)

    def summarise(self, q_BNwHd: jax.Array, k_BNwKd: jax.Array, v_BNwKd: jax.Array, scale: float) -> jax.Array:
        """``[B, N, H, d]``; softmax in float32."""
        B, N, w, H, d = q_BNwHd.shape
        K = k_BNwKd.shape[3]
        q = q_BNwHd.reshape(B, N, w, K, H // K, d)
        s = jnp.einsum("bnikgd,bnjkd->bnkgij", q, k_BNwKd, preferred_element_type=jnp.float32) * scale
        weight = jax.nn.softmax(s, axis=-1).mean(-2).astype(v_BNwKd.dtype)  # the mean of rows of O is the mean row's
        q_mean = jnp.einsum("bnkgj,bnjkd->bnkgd", weight, v_BNwKd)
        s = jnp.einsum("bnkgd,bnjkd->bnkgj", q_mean, k_BNwKd, preferred_element_type=jnp.float32) * scale
        weight = jax.nn.softmax(s, axis=-1).astype(k_BNwKd.dtype)
        return jnp.einsum("bnkgj,bnjkd->bnkgd", weight, k_BNwKd).reshape(B, N, H, d)

    def score(self, q_BTHd: jax.Array, summaries: jax.Array) -> jax.Array:
        """Raw query times chunk vector (eq. 1)."""
        return jnp.einsum("bthd,bnhd->bhtn", q_BTHd, summaries, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class LongHeads(Pattern):
    """Query t sees, per head, ``n = attention_length / chunk`` chunks of `chunk` tokens side by side: the first, the
    one before its own, its own up to itself, and the n - 3 others whose vectors its raw query likes best. The keys
    take positions 0, 1, … in that order, the query the next (``include_self``: its own), so no distance reaches
    `attention_length`, at most the length the model was trained at. Queries before `begin_selective_length` (None =
    `attention_length`) see every earlier token at its true position.

    `include_self=False` is the reference code's prefill, which leaves out the query's own key. `decode_rule`: what a
    single token added to a cache sees: as in prefill, or as in the reference code's decoding, where the query is part
    of its chunk and so at the end of a chunk the chunk before is not kept, only n - 1 chunks are seen, and selection
    begins one token earlier.

    The paper's values are chunks of 256 and the 4,096 tokens of Llama 2; the defaults keep its 16 chunks.
    Renumbered positions count tokens: `positions` other than the index are heeded before `begin_selective_length` only.
    """

    chunk: int = 128
    attention_length: int = 2048
    begin_selective_length: int | None = None
    include_self: bool = True
    decode_rule: Literal["prefill", "reference"] = "prefill"

    def __post_init__(self) -> None:
        w, A = self.chunk, self.attention_length
        if w < 1:
            raise UserError(f"model.pattern.chunk: must be at least 1, found {w}")
        if A < 1 or A % w:
            raise UserError(
                f"model.pattern.chunk: {w} does not divide attention_length = {A}; valid: a divisor of it, at most "
                f"{A // 3}"
            )
        if A // w < 3:
            raise UserError(
                f"model.pattern.attention_length: {A} holds {A // w} chunks of {w}; valid: at least 3 (the first, the "
                "one before the query's, and its own)"
            )
        if self.begin < A or self.begin % w:
            raise UserError(
                f"model.pattern.begin_selective_length: {self.begin} must be a multiple of chunk = {w} and at least "
                f"attention_length = {A} (before that there are fewer chunks than would be chosen)"
            )

    @property
    def begin(self) -> int:
        """Tokens of a text that see all before them."""
        return self.attention_length if self.begin_selective_length is None else self.begin_selective_length

    @property
    def n_chunks(self) -> int:
        """Chunks seen by a query and head."""
        return self.attention_length // self.chunk

    @property
    def summary(self) -> ChunkFeature:
        """What a cache must keep of every chunk."""
        return ChunkFeature(self.chunk)

    @property
    def picks(self) -> Picks:
        return Picks(self.chunk, self.n_chunks, self.begin)

    @property
    def most_seen(self) -> int:
        return self.attention_length

    def check(self, cfg: Model) -> None:
        """Rotary positions of fixed frequencies, and an attention length the model knows."""
        cfg.positions.fixed("model.pattern", "longheads", "renumbers")
        known = cfg.positions.known(cfg)
        if self.attention_length > known:
            raise UserError(
                f"model.pattern.attention_length: {self.attention_length} exceeds the {known} positions that the "
                "model knows (model.max_positions, times the factor of model.positions.scaling)"
            )

    def branches(self, ctx: Context) -> tuple[AnyBranch, ...]:
        if ctx.keys.leading:
            return (self._from_cache(ctx),)
        w, n, index = self.chunk, self.n_chunks, ctx.queries.index_BT
        at = ctx.queries.positions_BT if ctx.rotated else None  # a cache's keys come rotated to their places in chunks
        if ctx.k_BSKd.shape[1] <= self.begin:
            return (Branch(Causal(), k_positions=at),)
        early = EarlyQueries(self.begin)
        near: Mask = Causal() & NearChunks(w, 2)
        near = near if self.include_self else near & ~Window(1)
        query = ((n - 1) * w + index % w).astype(jnp.float32)
        out: tuple[AnyBranch, ...] = (
            Branch((Causal() & early) | (near & ~early), k_positions=at),
            Branch(Sinks(w) & ~early, q_positions=query, k_positions=at),
        )
        if n == 3:
            return out
        known = ctx.blocks or table(ctx, self.summary)
        ids = self._pick(ctx, known)
        query = query[:, None, :, None] - w * jnp.arange(1.0, n - 2)
        local = None if ctx.rotated else self.summary.places(ctx.keys.index_BT)
        return (*out, BlockBranch(Causal() & ~early, w, known.starts_BN, ids, query, local))

    def _pick(self, ctx: Context, known: BlockTable) -> jax.Array:
        """The n - 3 chunks of every query and head after the first and before the one before its own."""
        w, reference = self.chunk, self._reference(ctx)
        begin = self.begin - reference

        def candidates(index: jax.Array, numbers: jax.Array) -> jax.Array:
            ends = (index % w == w - 1) & reference  # the chunk before is not kept, so it may be chosen
            return (index >= begin) & (numbers >= 1) & (numbers <= index // w - 2 + ends)

        return pick(ctx.q_BTHd, ctx.queries, known, self.summary, self.n_chunks - 3, candidates)

    def _from_cache(self, ctx: Context) -> BlockBranch:
        """Everything through listed chunks: what is not seen is not read."""
        listed, place = self._listed(ctx)
        starts, end = rank_positions(listed, self.chunk, place)
        places = (end[..., None] - starts)[:, :1]  # every head lists as many chunks
        mask: Mask = Causal()
        if not self.include_self and not self._reference(ctx):
            mask = mask & (EarlyQueries(self.begin) | ~Window(1))
        return BlockBranch(mask, self.chunk, ctx.blocks.starts_BN, listed, places)

    def _reference(self, ctx: Context) -> bool:
        return self.decode_rule == "reference" and ctx.keys.leading > 0 and ctx.q_BTHd.shape[1] == 1

    def _listed(self, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """All chunks of every query ``[B, H, T, n or more]``, ascending but for -1, and its place in its own."""
        w, n, index = self.chunk, self.n_chunks, ctx.queries.index_BT
        H = ctx.q_BTHd.shape[2]
        t, own = index[:, None, :, None], (index // w)[:, None, :, None]
        ends_chunk = (index % w == w - 1)[:, None, :, None] & self._reference(ctx)
        begin = self.begin - self._reference(ctx)
        middle = self._pick(ctx, ctx.blocks)
        ends = [jnp.zeros_like(own), jnp.where(ends_chunk, -1, own - 1), own]
        first, before, own = (jnp.broadcast_to(x, (x.shape[0], H, x.shape[2], 1)) for x in ends)
        chosen = jnp.concatenate([first, middle, before, own], axis=-1)
        rest = self.begin // w - n
        chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, rest)), constant_values=-1)
        every = jnp.arange(n + rest)
        listed = jnp.where(t >= begin, chosen, jnp.where(every <= t // w, every, -1))
        return jnp.where(t >= 0, listed, -1), (index % w)[:, None]

    def taps(self, ctx: Context, branches: tuple[AnyBranch, ...]) -> dict[str, jax.Array]:
        """``blocks`` int32 ``[B, T, H, n]``: numbers of the chunks seen, ascending but for -1; all -1 before
        `begin_selective_length`."""
        w, n, index = self.chunk, self.n_chunks, ctx.queries.index_BT
        B, T, H, _ = ctx.q_BTHd.shape
        if ctx.keys.leading:
            last = branches[-1]
            assert isinstance(last, BlockBranch)
            chosen = last.ids_BHTn[..., :n]
        elif ctx.k_BSKd.shape[1] <= self.begin:
            return {"blocks": jnp.full((B, T, H, n), -1, jnp.int32)}
        else:
            own = jnp.broadcast_to((index // w)[:, None, :, None], (B, H, T, 1))
            parts = [jnp.zeros_like(own), own - 1, own]
            last = branches[-1]
            if isinstance(last, BlockBranch):
                numbers = jnp.take_along_axis(ctx.keys.index_BT, jnp.maximum(last.starts_BN, 0), 1) // w
                ids = last.ids_BHTn
                got = jnp.take_along_axis(numbers, jnp.maximum(ids, 0).reshape(B, -1), 1).reshape(ids.shape)
                parts.insert(1, jnp.where(ids >= 0, got, -1))
            chosen = jnp.concatenate(parts, axis=-1)
        begin = self.begin - self._reference(ctx)
        chosen = jnp.where((index >= begin)[:, None, :, None], chosen, -1)
        return {"blocks": jnp.moveaxis(chosen, 1, 2).astype(jnp.int32)}
