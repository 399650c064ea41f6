"""The socket ``model.pattern``: what a pattern says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import jax

from lm.attention.blocks import Summary
from lm.attention.branches import AnyBranch, Context
from lm.plug import Model, Plug


@dataclass(frozen=True)
class Picks:
    """Of a pattern whose heads pick chunks of the text: tokens of a chunk, how many chunks a query sees per head (the
    first, the one before its own and its own always among them), and the tokens of a text that see all before them."""

    chunk: int
    n_chunks: int
    begin: int


class Pattern(Plug):
    """Which keys a query sees, and at which positions: a frozen dataclass that forms the branches of one softmax."""

    KEY: ClassVar[str] = "model.pattern"

    def check(self, cfg: Model) -> None:
        """Raises `UserError` for a model that the pattern does not fit."""

    @classmethod
    def trained_at(cls, length: int) -> Self:
        """The pattern for a model that was trained at so many tokens."""
        return cls()

    def for_layer(self, i: int) -> Self:
        """The pattern of layer i, counted from 0."""
        return self

    def branches(self, ctx: Context) -> tuple[AnyBranch, ...]:
        """Disjoint branches whose union is what the queries see."""
        raise NotImplementedError

    def taps(self, ctx: Context, branches: tuple[AnyBranch, ...]) -> dict[str, jax.Array]:
        """What the pattern has chosen, for those who watch: name -> array ``[B, T, …]``."""
        return {}

    @property
    def kept(self) -> tuple[int, int] | None:
        """(sinks, window): the first and the last tokens, all that a cache must hold; None = every token."""
        return None

    @property
    def summary(self) -> Summary | None:
        """What a cache must keep of every block of keys; None = nothing."""
        return None

    @property
    def picks(self) -> Picks | None:
        """How chunks are picked, for a pattern that taps them as ``attn/blocks``; None = nothing is picked."""
        return None

    @property
    def lists_keys(self) -> bool:
        """Whether single keys are listed at run time, which kernels refuse."""
        return False

    @property
    def most_seen(self) -> int | None:
        """Keys that a query sees at most; None = all before it."""
        return None if self.kept is None else sum(self.kept)

    def seen(self, start: int, tokens: int) -> float:
        """Pairs of a query and a key that it sees, over `tokens` queries behind `start` other tokens."""
        most = start + tokens if self.most_seen is None else self.most_seen
        below = min(max(most - start, 0), tokens)  # queries that see all before them
        return below * start + below * (below + 1) / 2 + (tokens - below) * most
