"""The socket ``model.mixer``: what a token-mixing layer says of itself."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn

from lm.caches.base import State
from lm.plug import Model, Plug


class Mixer(Plug):
    """The token-mixing layer of a block: a frozen dataclass of settings."""

    KEY: ClassVar[str] = "model.mixer"

    def check(self, cfg: Model) -> None:
        """Raises `UserError` for a model that the mixer does not fit."""

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        """A module whose call is ``(x[B, T, D], layer: LayerInputs, cache: State | None) -> LayerOut``."""
        raise NotImplementedError

    def cache(self, cfg: Model, batch: int, capacity: int) -> State | None:
        """The empty state of `batch` rows with room for `capacity` tokens; None for a mixer without memory."""
        return None

    def uncached(self, cfg: Model) -> str:
        """Why a text cannot be continued token by token; empty where it can."""
        return ""

    def flops(self, cfg: Model, start: int, tokens: int) -> float:
        """Of a row's forward pass over `tokens` tokens behind `start` others, beside products with weights."""
        return 0.0

    def flops_per_token(self, cfg: Model, seq_len: int) -> float:
        """The same per token of a row of `seq_len` tokens, as publications count it: the causal half, whatever is
        skipped (arXiv 2204.02311, appendix B)."""
        return 0.0

    def key(self, cfg: Model) -> tuple[int, int]:
        """Heads and channels of a cached token's key, and of its value; what is not kept as keys need not say."""
        return cfg.kv_heads, cfg.head_width

    def between(self, cfg: Model, heads: int, kv_heads: int) -> float:
        """Numbers of a token that a chip keeps for the backward pass, between the mixer's input and its last product;
        `heads`, `kv_heads`: in how many parts these axes are cut."""
        return 0.0

    @property
    def backend(self) -> str:
        """What computes it, for tables; empty where there is no choice."""
        return ""
