"""No surgery: all parameters are trained as they are."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from lm.config import ModelConfig
from lm.surgery.base import Params, Surgery
from lm.surgery.calibration import Calibration


@dataclass(frozen=True)
class FullTraining(Surgery):
    """The trained tree is the parameter tree."""

    @property
    def trains(self) -> bool:
        return True

    def apply(self, cfg: ModelConfig, params: Params, data: Calibration | None = None) -> tuple[ModelConfig, Params]:
        return cfg, params

    def init(self, cfg: ModelConfig, params: Params, rng: jax.Array) -> Params:
        return params

    def attach(self, cfg: ModelConfig, params: Params, trained: Params, rng: jax.Array | None = None) -> Params:
        return trained

    def merge(self, cfg: ModelConfig, params: Params, trained: Params) -> Params:
        return trained
