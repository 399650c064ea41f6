"""The socket ``model.head``: what a head says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import numpy as np

from lm.plug import Model, Plug

Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class Targets:
    """What a loss is taken over: hidden states ``[B, T, D]`` after the final norm, targets int32 and weights float32
    ``[B, T]``; ``z_loss`` weighs ``log^2 Z``; of `chunk` tokens logits exist at one time (0 = of all)."""

    hidden_BTD: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    z_loss: float = 0.0
    chunk: int = 1024


class Head(Plug):
    """From a hidden state to a distribution over the vocabulary: a frozen dataclass of settings."""

    KEY: ClassVar[str] = "model.head"

    def check(self, cfg: Model) -> None:
        """Raises `UserError` for a model that the head does not fit."""

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        """A module whose call is ``(hidden[..., D], embedding_table[V, D]) -> logits float32[..., V]``."""
        raise NotImplementedError

    @property
    def reads_embedding(self) -> bool:
        """Whether logits are products with the embedding table."""
        return False

    def loss(self, cfg: Model, params: Mapping[str, Any], over: Targets) -> tuple[jax.Array, Sums] | None:
        """A cross-entropy that holds no array of all logits, auxiliary losses included; None where the head has none of
        its own (`lm.objectives.likelihood.head_loss`)."""
        return None

    def aux(self, cfg: Model, params: Mapping[str, Any], hidden: jax.Array) -> dict[str, jax.Array]:
        """Further losses of every token by name, float32 ``[...]``, weighted already. The objective adds their sum over
        the weighted tokens to the loss and reports each as ``aux_<name>``."""
        return {}

    def bins(self, n: int) -> np.ndarray | None:
        """Where on [-1, 1] the ids 0 … n - 1 lie, float64 ``[n]``; None where ids have no order."""
        return None

    @property
    def resolution(self) -> int | None:
        """How fine the distribution can be (terms of a series); None where there is no such number."""
        return None

    def at_resolution(self, n: int) -> Self:
        """The same head with another resolution."""
        return self
