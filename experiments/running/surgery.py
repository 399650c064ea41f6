"""Surgery on parameters that were read, drawn or trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm.config import ModelConfig
from lm.data.tokenizers import Tokenizer
from lm.surgery.base import Surgery


def applied(
    surgery: Sequence[Surgery], cfg: ModelConfig, params: Any, tokenizer: Tokenizer | None
) -> tuple[ModelConfig, Any]:
    """The model and parameters that the plugs make of these, one after the other; those that look at texts get theirs.
    Raises `UserError` for a model that a plug does not fit, and for texts that cannot be read."""
    for one in surgery:
        one.check(cfg)
        cfg, params = one.apply(cfg, params, None if one.reads is None else one.reads.read(tokenizer))
    return cfg, params
