"""Plain causal attention, and its bidirectional and prefix relatives."""

from __future__ import annotations

from dataclasses import dataclass

from lm.attention.branches import Branch, Context
from lm.attention.masks import Causal as CausalMask
from lm.attention.masks import Full, Prefix
from lm.errors import UserError
from lm.patterns.base import Pattern


@dataclass(frozen=True)
class Causal(Pattern):
    """Every earlier token and the token itself; `prefix` leading tokens are visible to all."""

    prefix: int = 0

    def __post_init__(self) -> None:
        if self.prefix < 0:
            raise UserError(f"model.pattern.prefix: must not be negative, found {self.prefix}")

    def branches(self, ctx: Context) -> tuple[Branch, ...]:
        return (Branch(CausalMask() | Prefix(self.prefix) if self.prefix else CausalMask()),)


@dataclass(frozen=True)
class Bidirectional(Pattern):
    """Every token of the document."""

    def branches(self, ctx: Context) -> tuple[Branch, ...]:
        return (Branch(Full()),)
