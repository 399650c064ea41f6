"""SOCKET surgery: other parameters made of given ones, for use at once or for training.

A plug is a frozen dataclass. With `trains` False it has ``apply(cfg, params) -> (cfg, params)``. With `trains` True
(`Trainable`) training changes and saves the tree that ``init`` gives, and computes with what ``attach`` makes of it.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from lm.config import ModelConfig
from lm.plug import Table

TABLE = Table(
    {
        "none": "lm.surgery.full_training:FullTraining",
        "lora": "lm.surgery.lora:LoRA",
        "int8": "lm.surgery.int8:Int8",
    }
)


class Trainable(Protocol):
    """`adds`: the given parameters stay as they are and must be at hand to attach to. `stochastic`: `attach` draws from
    `rng` while training. ``check`` raises `UserError` for a model it does not fit; ``merge`` gives plain arrays."""

    @property
    def trains(self) -> bool: ...

    @property
    def adds(self) -> bool: ...

    @property
    def stochastic(self) -> bool: ...

    def check(self, cfg: ModelConfig) -> None: ...

    def init(self, cfg: ModelConfig, params: Any, rng: jax.Array) -> Any: ...

    def attach(self, cfg: ModelConfig, params: Any, trained: Any, rng: jax.Array | None = None) -> Any: ...

    def merge(self, cfg: ModelConfig, params: Any, trained: Any) -> Any: ...
