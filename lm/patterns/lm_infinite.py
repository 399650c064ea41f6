"""LM-Infinite: a Λ-shaped mask and a ceiling on distances (arXiv 2308.16137, sections 3-4)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from lm.attention.branches import NEG, Branch, Context, chosen
from lm.attention.masks import Causal, Mask, Sinks, Window
from lm.errors import UserError
from lm.patterns.base import Pattern
from lm.plug import bounded
from lm.positions.base import largest_of_text


@dataclass(frozen=True)
class LMInfinite(Pattern):
    """Key j is visible to query t iff ``j <= t`` and (``t - j < window`` or ``j < sinks``), at distance
    ``min(t - j, ceiling)``.

    `window` is the length the model was trained at; None drops the mask (the paper's ceiling-only arm). `ceiling`
    None means no ceiling; the paper's value is the window itself, so a far sink sits at distance L (one more than was
    seen in training; the authors keep it). With `top_k > 0`, layers from `top_k_from_layer` (0-based) on also attend
    to the k best middle tokens per head, scored and used as if at distance `top_k_distance` (None = window // 2), for
    the last `top_k_queries` queries of a text (1 = the reference code; None = every query, as the paper says).
    """

    window: int | None = bounded(4096, at_least=1)
    sinks: int = 10
    ceiling: float | None = 4096.0
    top_k: int = 0
    top_k_from_layer: int = 4
    top_k_distance: float | None = None
    top_k_queries: int | None = bounded(1, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("sinks", self.sinks), ("top_k", self.top_k), ("top_k_from_layer", self.top_k_from_layer)):
            if value < 0:
                raise UserError(f"model.pattern.{name}: must not be negative, found {value}")
        for name, distance in (("ceiling", self.ceiling), ("top_k_distance", self.top_k_distance)):
            if distance is not None and not 0 <= distance < math.inf:
                raise UserError(f"model.pattern.{name}: must be finite and not negative, or None, found {distance}")
        if self.top_k and self.window is None:
            raise UserError("model.pattern.top_k: needs a window (there is no middle without one)")

    @classmethod
    def trained_at(cls, length: int) -> Self:
        return cls(length, ceiling=float(length))

    def for_layer(self, i: int) -> Self:
        """Early layers do without the far tokens."""
        if self.top_k and i < self.top_k_from_layer:
            return dataclasses.replace(self, top_k=0)
        return self

    @property
    def kept(self) -> tuple[int, int] | None:
        return None if self.window is None or self.top_k else (self.sinks, self.window)

    @property
    def lists_keys(self) -> bool:
        return self.top_k > 0

    def branches(self, ctx: Context) -> tuple[Branch, ...]:
        seen: Mask = Causal()
        if self.window is not None:
            seen = seen & (Window(self.window) | Sinks(self.sinks))
        if self.ceiling is None:
            out: tuple[Branch, ...] = (Branch(seen),)
        else:
            within = Window(int(self.ceiling) + 1)
            beyond = seen & ~within
            if self.window is not None and self.window <= self.ceiling:  # the window is within: only sinks are beyond
                beyond = Sinks(self.sinks) & ~within
            out = (Branch(seen & within), Branch(beyond, q_positions=self.ceiling, k_positions=0.0))
        return (*out, self._far_tokens(ctx)) if self.top_k else out

    def _far_tokens(self, ctx: Context) -> Branch:
        """The k best keys ``sinks <= j <= t - window`` per query head, in the same logits they will be used with."""
        assert self.window is not None
        distance = self.top_k_distance if self.top_k_distance is not None else self.window // 2
        rows = self._rows(ctx)
        middle = Causal() & ~Window(self.window) & ~Sinks(self.sinks)
        qi, ki = chosen(ctx.queries.index_BT, rows)[:, :, None], ctx.keys.index_BT[:, None, :]
        seen = middle(qi, ki) & (ki >= 0) & (qi >= 0)
        if ctx.queries.segments_BT is not None and ctx.keys.segments_BT is not None:
            seen &= chosen(ctx.queries.segments_BT, rows)[:, :, None] == ctx.keys.segments_BT[:, None, :]
        if isinstance(rows, jax.Array):
            seen &= rows[:, :, None] >= 0
        enough = seen.sum(-1, keepdims=True) >= self.top_k  # the middle must hold at least k keys
        s = jnp.where((seen & enough)[:, None], self._scores(ctx, rows, float(distance)), NEG)
        k = min(self.top_k, s.shape[-1])
        best, ids = jax.lax.top_k(jax.lax.stop_gradient(s), k)
        ids = jnp.where(best > NEG / 2, ids, -1)
        return Branch(middle, q_positions=float(distance), k_positions=0.0, rows=rows, gather_BHTn=ids)

    def _rows(self, ctx: Context) -> int | jax.Array:
        """Which queries look for far tokens (`Branch.rows`): the last of each text, wherever a row has them. Of a tree
        every node does, because it would be the last one if it were accepted."""
        T, wanted, queries = ctx.q_BTHd.shape[1], self.top_k_queries, ctx.queries
        if wanted is None or queries.ancestors_BTT is not None:
            return T
        if queries.contiguous:
            return min(wanted, T)
        index, slots = queries.index_BT, jnp.arange(T, dtype=jnp.int32)
        if queries.segments_BT is not None:  # as many texts as there are segments, anywhere
            last_BT = largest_of_text(index, queries.segments_BT)
            return jnp.where((index >= 0) & (index > last_BT - wanted), slots, -1)
        ends_B = index.max(1) + 1 if queries.ends_B is None else queries.ends_B
        at = index.argmax(1).astype(jnp.int32)[:, None] - slots[: min(wanted, T)]
        there = chosen(index, at)
        return jnp.where((at >= 0) & (there >= 0) & (there >= ends_B[:, None] - wanted), at, -1)

    def _scores(self, ctx: Context, rows: int | jax.Array, distance: float) -> jax.Array:
        """float32 ``[B, H, rows, S]``. A constant distance adds the same bias to all keys, so biases drop out."""
        B, _, H, d = ctx.q_BTHd.shape
        K = ctx.k_BSKd.shape[2]
        (q, _), (k, _) = ctx.queries_at(distance, rows), ctx.keys_at(0.0)
        q = q.reshape(B, -1, K, H // K, d)
        s = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
        return s.reshape(B, H, q.shape[1], -1)
