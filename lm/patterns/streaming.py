"""Attention sinks plus a window (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import jax.numpy as jnp

from lm.attention.branches import Branch, Context
from lm.attention.masks import Causal, Sinks, Window
from lm.errors import UserError
from lm.patterns.base import Pattern


@dataclass(frozen=True)
class Streaming(Pattern):
    """The first `sinks` tokens and the last `window` tokens including the query's own.

    `sink_positions="cache"` is the paper's: positions are those inside a cache that holds just these tokens, so a
    query sees sink j at distance ``min(t, sinks + window - 1) - j``. ``"true"`` keeps the text's distances (the Λ arm
    of arXiv 2308.16137 figure 5).
    """

    window: int = 4096
    sinks: int = 4
    sink_positions: Literal["cache", "true"] = "cache"

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise UserError(
                f"model.pattern: window must be at least 1 and sinks at least 0, "
                f"found window={self.window}, sinks={self.sinks}"
            )

    @classmethod
    def trained_at(cls, length: int) -> Self:
        return cls(length)

    @property
    def kept(self) -> tuple[int, int]:
        return self.sinks, self.window

    def branches(self, ctx: Context) -> tuple[Branch, ...]:
        near = Causal() & Window(self.window)
        if self.sink_positions == "true":
            return (Branch(Causal() & (Window(self.window) | Sinks(self.sinks))),)
        index = ctx.queries.index_BT
        # Shift by whole tokens, so that fractional or offset positions keep their offset.
        shift = jnp.maximum(index - (self.sinks + self.window - 1), 0).astype(jnp.float32)
        far = Branch(Sinks(self.sinks) & ~Window(self.window), q_positions=ctx.queries.positions_BT - shift)
        return (Branch(near), far)
