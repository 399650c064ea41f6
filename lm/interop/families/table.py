"""Tables from parameter names to the names of tensors in a file, and how a tensor is turned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lm.config import ModelConfig

Turn = Callable[[np.ndarray, ModelConfig], np.ndarray]
# our name (without "blocks/") -> (name in the file, `{i}` = layer, `{e}` = expert; how to turn it)
Table = dict[str, tuple[str, Turn]]


def same(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    return x


def flip(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """``[out, in]`` -> ``[in, out]``."""
    return x.T


def linear_rows(ours: str, theirs: str, turn: Turn = flip) -> Table:
    """A linear layer: its matrix and its bias."""
    return {f"{ours}/kernel": (f"{theirs}.weight", turn), f"{ours}/bias": (f"{theirs}.bias", same)}


def norm_rows(ours: str, theirs: str) -> Table:
    """A norm: its scale and its bias."""
    return {f"{ours}/scale": (f"{theirs}.weight", same), f"{ours}/bias": (f"{theirs}.bias", same)}


def fused_rows(theirs: str, part: Callable[[int], Turn]) -> Table:
    """Queries, keys and values that one layer of the file computes; ``part(n)`` cuts the n-th out of its tensors."""
    return {
        f"attn/{name}/{ours}": (f"{theirs}.{suffix}", part(n))
        for n, name in enumerate("qkv")
        for ours, suffix in (("kernel", "weight"), ("bias", "bias"))
    }
