"""No positional encoding: the causal mask is the only order signal (arXiv 2305.19466)."""

from __future__ import annotations

from dataclasses import dataclass

from lm.positions.base import Positions


@dataclass(frozen=True)
class NoPE(Positions):
    """The identity."""
