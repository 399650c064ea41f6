"""No surgery: all parameters are trained as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from lm.config import ModelConfig


@dataclass(frozen=True)
class FullTraining:
    """The trained tree is the parameter tree."""

    @property
    def trains(self) -> bool:
        return True

    @property
    def adds(self) -> bool:
        return False

    @property
    def stochastic(self) -> bool:
        return False

    def apply(self, cfg: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
        return cfg, params

    def check(self, cfg: ModelConfig) -> None:
        pass

    def init(self, cfg: ModelConfig, params: Any, rng: jax.Array) -> Any:
        return params

    def attach(self, cfg: ModelConfig, params: Any, trained: Any, rng: jax.Array | None = None) -> Any:
        return trained

    def merge(self, cfg: ModelConfig, params: Any, trained: Any) -> Any:
        return trained
