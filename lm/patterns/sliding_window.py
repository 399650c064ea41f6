"""Sliding-window attention (Mistral, arXiv 2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lm.attention.branches import Branch, Context
from lm.attention.masks import Causal, Window
from lm.patterns.base import Pattern
from lm.plug import bounded


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """The last `window` tokens including the query's own (see `masks` for the convention)."""

    window: int = bounded(4096, at_least=1)

    @classmethod
    def trained_at(cls, length: int) -> Self:
        return cls(length)

    @property
    def kept(self) -> tuple[int, int]:
        return 0, self.window

    def branches(self, ctx: Context) -> tuple[Branch, ...]:
        return (Branch(Causal() & Window(self.window)),)
