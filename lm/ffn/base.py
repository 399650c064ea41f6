"""The socket ``model.ffn``: what a channel-mixing layer says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np

from lm.plug import Model, Plug

WIDE = 5  # arrays [tokens, d_ff] alive at once in a layer's backward pass, read off a TPU compiler's reports


class FFN(Plug):
    """The channel-mixing layer of a block: a frozen dataclass of settings."""

    KEY: ClassVar[str] = "model.ffn"
    reports: ClassVar[bool] = False  # whether the layer reports losses and sums (`lm.model.reports`)

    def check(self, cfg: Model) -> None:
        """Raises `UserError` for a model that the layer does not fit."""

    def for_layer(self, i: int) -> FFN:
        """The plug of layer i, counted from 0."""
        return self

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        """A module whose call is ``(x[B, T, D], layer: LayerInputs) -> LayerOut``."""
        raise NotImplementedError

    @property
    def uncached(self) -> str:
        """Why a text cannot be continued token by token; empty where it can."""
        return ""

    @property
    def n_experts(self) -> int:
        """Experts that tokens are sent to; 1 for a layer that is none of them."""
        return 1

    @property
    def choices(self) -> int:
        """Experts of a token; 0 where nothing is chosen."""
        return 0

    @property
    def active(self) -> float:
        """The share of stacked experts' weights that a token passes."""
        return 1.0

    def width(self, cfg: Model) -> int:
        """Channels between the layer's two products."""
        return cfg.d_ff

    def rows(self, cfg: Model, tokens: float, parts: int, exchange: float | None) -> float:
        """Rows that a device works on, of its `tokens`: those that come to its experts, where experts are cut into
        `parts` and at most `exchange` times an even share is sent (`lm.sharding.Layout`)."""
        return tokens

    def alive(self, cfg: Model, rows: float, parts: int, inner: int) -> float:
        """Numbers alive at once in the backward pass over `rows`, channels cut into `inner` parts."""
        return WIDE * rows * self.width(cfg) / inner

    def update(self, params: Mapping[str, Any], sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Parameters that a rule moves after a step, by name below the layer: from the layer's parameters and the
        step's sums (`lm.model.reports`)."""
        return {}

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What the log says of the layer's sums: numbers, or lists with one entry per expert."""
        return {}


class Activated(FFN):
    """A plain or gated layer with an activation, which an expert of a mixture can be too."""

    activation: ClassVar[Callable[[jax.Array], jax.Array]]
    bias: bool = False

    def opened(self, x: jax.Array) -> jax.Array:
        """The activation of the first product, or of the gate where there is one."""
        return type(self).activation(x)

    def passed(self, up: jax.Array) -> jax.Array:
        """What an opened gate multiplies."""
        return up

    def inner(self, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """What goes into the last product."""
        return self.opened(up) if gate is None else self.opened(gate) * self.passed(up)
