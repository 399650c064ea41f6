"""Sliding-window attention (Mistral, arXiv 2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass

from lm.attention.branches import Branch, Context
from lm.attention.masks import Causal, Window
from lm.errors import UserError


@dataclass(frozen=True)
class SlidingWindow:
    """The last `window` tokens including the query's own (see `masks` for the convention)."""

    window: int = 4096

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"model.pattern.window: must be at least 1, found {self.window}")

    @property
    def keeps(self) -> tuple[int, int]:
        """(sinks, window) a cache must hold."""
        return 0, self.window

    def branches(self, ctx: Context) -> tuple[Branch, ...]:
        return (Branch(Causal() & Window(self.window)),)
