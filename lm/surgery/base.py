"""The socket of surgeries: ``train.surgery``, and ``arms.NAME.surgery`` between training and measuring."""

from __future__ import annotations

from typing import Any, ClassVar

import jax

from lm.config import ModelConfig
from lm.plug import Plug
from lm.surgery.calibration import Calibration, CalibrationText

Params = Any  # a tree of arrays and weights


class Surgery(Plug):
    """A change of given parameters: a frozen dataclass of settings.

    With `trains` False, `apply` changes a model once. With `trains` True, training changes and saves the tree that
    `init` gives, and computes with what `attach` makes of it.
    """

    KEY: ClassVar[str] = "train.surgery"

    @property
    def trains(self) -> bool:
        """Whether it is a way to train, rather than a change of finished parameters."""
        return False

    @property
    def adds(self) -> bool:
        """Whether the given parameters stay as they are, and must be at hand to attach to."""
        return False

    @property
    def stochastic(self) -> bool:
        """Whether `attach` draws while training."""
        return False

    @property
    def reads(self) -> CalibrationText | None:
        """The text that `apply` is given to look at; None = it looks at none."""
        return None

    def check(self, cfg: ModelConfig) -> None:
        """Raises `UserError` for a model that it does not fit."""

    def apply(self, cfg: ModelConfig, params: Params, data: Calibration | None = None) -> tuple[ModelConfig, Params]:
        """The changed model and its parameters; `data`: the rows of `reads`, None where it reads nothing."""
        raise NotImplementedError

    def init(self, cfg: ModelConfig, params: Params, rng: jax.Array) -> Params:
        """What is trained."""
        raise NotImplementedError

    def attach(self, cfg: ModelConfig, params: Params, trained: Params, rng: jax.Array | None = None) -> Params:
        """The parameters to compute with; `rng` is given in training."""
        raise NotImplementedError

    def merge(self, cfg: ModelConfig, params: Params, trained: Params) -> Params:
        """Plain arrays, for use."""
        raise NotImplementedError
