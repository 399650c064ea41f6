"""SOCKET cache: keys and values of earlier tokens, as explicit pytrees.

A plug is a frozen dataclass with ``init(batch, n_kv_heads, head_dim, dtype, rotated) -> state``; the state has
``extend(k_BTKd, v_BTKd, tokens) -> (state, k_BSKd, v_BSKd, keys)`` (everything the T new queries may see, and what is
known about it), and ``rotated``: whether keys are stored after their rotation. Rotated is the rule: each key is
rotated once, and a pattern that wants a key elsewhere turns it by the difference. Raw keys are needed only where
frequencies depend on the length of the text. Optional: ``places(tokens) -> float32[B, T]``, where keys are rotated to
before they are stored (default: their own positions); ``summarise(ctx) -> (state, ctx)``, called after `extend` with
the queries in sight, for caches that keep more than keys and values; ``AXES``, the logical axes of its arrays by field
(`lm.sharding.layout`), without which every device holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lm.attention.branches import Tokens
from lm.caches.blocks import Blocks
from lm.caches.full import Full
from lm.caches.sink_window import SinkWindow
from lm.config import ModelConfig
from lm.errors import UserError
from lm.plug import Table

__all__ = ["TABLE", "Tokens", "axes", "check", "default", "init", "n_bytes", "needs_raw_keys"]

TABLE = Table(
    {
        "full": "lm.caches.full:Full",
        "sink_window": "lm.caches.sink_window:SinkWindow",
        "block_memory": "lm.caches.blocks:Blocks",
    }
)


def needs_raw_keys(cfg: ModelConfig) -> bool:
    """Whether rotary frequencies change with the length of the text."""
    return bool(getattr(cfg.positions, "length_dependent", False))


def default(cfg: ModelConfig, capacity: int, quantize: str | None = None) -> Any:
    """The smallest cache that loses nothing under the layer's pattern; `quantize`: ``int8`` or None."""
    summary = getattr(cfg.pattern, "summary", None)
    if summary is not None:
        return Blocks(capacity, cfg.n_heads, summary, quantize)
    keeps = getattr(cfg.pattern, "keeps", None)
    if keeps is None or keeps[0] >= capacity:
        return Full(capacity, quantize)
    return SinkWindow(keeps[0], min(keeps[1], capacity - keeps[0]), quantize)


def check(cfg: ModelConfig) -> None:
    """Raises `UserError` with the reason when a layer of the model cannot continue a text token by token."""
    for i, layer in enumerate(cfg.layers()):
        why = getattr(layer.ffn, "uncached", "")
        if why:
            raise UserError(f"model.ffn: layer {i} cannot generate or decode with a cache: {why}")


def init(cfg: ModelConfig, batch: int, capacity: int, plug: Any = None, quantize: str | None = None) -> tuple[Any, ...]:
    """Empty caches for `batch` rows of at most `capacity` tokens, one state per layer: of `plug`, or the smallest that
    lose nothing under each layer's pattern. Raises `UserError` for models that cannot be decoded (`check`), and where
    `plug` lacks summaries that a pattern needs."""
    check(cfg)
    for layer in cfg.layers() if plug is not None else ():
        wanted = getattr(layer.pattern, "summary", None)
        if wanted is not None and getattr(plug, "summary", None) != wanted:
            raise UserError(
                f"cache: {type(plug).__name__} keeps no {wanted} for pattern {type(layer.pattern).__name__}; "
                "valid: the pattern's own cache (none named)"
            )
    return tuple(
        (plug or default(layer, capacity, quantize)).init(
            batch, layer.n_kv_heads, layer.head_dim, layer.dtype, not needs_raw_keys(layer)
        )
        for layer in cfg.layers()
    )


def axes(cache: Any, place: Callable[[tuple[str | None, ...]], Any]) -> Any:
    """The caches of all layers with ``place(logical axes)`` in the place of every array."""

    def layer(state: Any) -> Any:
        known: dict[str, tuple[str | None, ...]] = getattr(type(state), "AXES", {})
        return jax.tree_util.tree_map_with_path(lambda path, _: place(known.get(str(path[0].name), ())), state)

    return tuple(layer(state) for state in cache)


def n_bytes(cache: Any) -> int:
    """Bytes of all arrays of a cache."""
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(cache))
