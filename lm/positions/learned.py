"""Learned absolute positions, added to the token embeddings (GPT-2)."""

from __future__ import annotations

from dataclasses import dataclass

from lm.errors import UserError
from lm.positions.nope import NoPE


@dataclass(frozen=True)
class Learned(NoPE):
    """A table of `size` rows. Positions are rounded down and clipped to the table."""

    size: int = 1024

    @property
    def table_size(self) -> int:
        return self.size

    def check(self, cfg: object) -> None:
        if self.size < 1:
            raise UserError(f"model.positions.size: must be at least 1, found {self.size}")
