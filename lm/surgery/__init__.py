"""SOCKET surgery: other parameters made of given ones, and which of them are trained.

A plug is a frozen dataclass. ``check(cfg)`` raises `UserError` for a model it does not fit; ``init(cfg, params, rng)``
gives the tree that training changes and saves; ``attach(cfg, params, trained, rng=None)`` the parameters to compute
with; ``merge(cfg, params, trained)`` the same as plain arrays. `adds` says that `params` stay as they are and must be
at hand to attach to; `stochastic` that `attach` draws from `rng` while training.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from lm.config import ModelConfig
from lm.surgery.lora import LoRA
from lm.surgery.nothing import Nothing

TABLE = {"none": Nothing, "lora": LoRA}


class Surgery(Protocol):
    @property
    def adds(self) -> bool: ...

    @property
    def stochastic(self) -> bool: ...

    def check(self, cfg: ModelConfig) -> None: ...

    def init(self, cfg: ModelConfig, params: Any, rng: jax.Array) -> Any: ...

    def attach(self, cfg: ModelConfig, params: Any, trained: Any, rng: jax.Array | None = None) -> Any: ...

    def merge(self, cfg: ModelConfig, params: Any, trained: Any) -> Any: ...
