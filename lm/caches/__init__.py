"""SOCKET cache: keys and values of earlier tokens, as explicit pytrees.

A plug is a frozen dataclass with ``init(batch, n_kv_heads, head_dim, dtype, rotated) -> state``; the state has
``extend(k_BTKd, v_BTKd, tokens) -> (state, k_BSKd, v_BSKd, keys)`` (everything the T new queries may see, and what is
known about it), and ``rotated``: whether keys are stored after their rotation. Raw keys are needed by patterns that
give keys other positions than their own and by frequency scalings that depend on the length; all others store
rotated keys and so rotate each key once.
"""

from __future__ import annotations

from typing import Any

import jax

from lm.caches.full import Full
from lm.caches.sink_window import SinkWindow
from lm.config import ModelConfig

TABLE = {"full": Full, "sink_window": SinkWindow}


def needs_raw_keys(cfg: ModelConfig) -> bool:
    """Whether the pattern moves keys to other positions, or frequencies change with the length."""
    return bool(getattr(cfg.pattern, "moves_keys", False) or getattr(cfg.positions, "length_dependent", False))


def default(cfg: ModelConfig, capacity: int) -> Any:
    """The smallest cache that loses nothing under the layer's pattern."""
    keeps = getattr(cfg.pattern, "keeps", None)
    if keeps is None or sum(keeps) >= capacity:
        return Full(capacity)
    return SinkWindow(*keeps)


def init(cfg: ModelConfig, batch: int, capacity: int, plug: Any = None) -> tuple[Any, ...]:
    """Empty caches for `batch` rows of at most `capacity` tokens, one state per layer."""
    return tuple(
        (plug or default(layer, capacity)).init(
            batch, layer.n_kv_heads, layer.head_dim, layer.dtype, not needs_raw_keys(layer)
        )
        for layer in cfg.layers()
    )


def n_bytes(cache: Any) -> int:
    """Bytes of all arrays of a cache."""
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(cache))
