"""Surgery on parameters that were read, drawn or trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm.config import ModelConfig
from lm.surgery.base import Surgery


def applied(surgery: Sequence[Surgery], cfg: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The model and parameters that the plugs make of these, one after the other."""
    for one in surgery:
        cfg, params = one.apply(cfg, params)
    return cfg, params
