"""What the layers of a call have handed out (`lm.watch`), by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

Taps = dict[str, jax.Array]

STREAM = "stream"  # the residual stream after a layer


def named(collection: Mapping[str, Any], prefix: str = "") -> Taps:
    """What a layer's modules have handed out, by full name: ``attn/blocks``, ``ffn/up/input``."""
    out: Taps = {}
    for name, value in collection.items():
        place = f"{prefix}{name}"
        out |= named(value, f"{place}/") if isinstance(value, dict) else {place: value}
    return out
