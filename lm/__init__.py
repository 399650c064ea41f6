"""Decoder Lab: one functional decoder, every published method a plug.

``import lm`` is cheap: the public names below load their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Decoder": "lm.model.decoder",
    "DecoderModel": "lm.model.language_model",
    "Inputs": "lm.model.inputs",
    "ModelConfig": "lm.config",
    "UserError": "lm.errors",
    "Watch": "lm.watch",
    "model_config": "lm.config",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lm' has no attribute {name!r}")
