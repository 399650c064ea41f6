"""Analytic cost of training, and what the device could do: the two sides of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.model import params

# Peak dense bfloat16 FLOP/s of one chip, from the vendors' data sheets. Devices not listed: a measured product.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def per_token(cfg: ModelConfig, seq_len: int, frozen: bool = False) -> float:
    """FLOPs per token of forward and backward: six per weight of a matrix (four where weights are `frozen` and have no
    gradient; adapters to them are not counted), and attention over the causal half of rows
    of `seq_len` tokens whatever the pattern skips (arXiv 2204.02311, appendix B). Embedding look-ups are free."""
    blocks, head = weights(cfg)
    mixing = sum(layer.mixer.flops_per_token(layer, seq_len) for layer in cfg.layers())
    return (4.0 if frozen else 6.0) * (blocks + head) + 3.0 * mixing


def weights(cfg: ModelConfig) -> tuple[float, float]:
    """Weights of matrices that a token passes: in the layers, and in the head."""
    tree = params.abstract(cfg)
    axes, layers = params.axes(cfg), cfg.layers()
    matrices, tables = params.names(axes.matrices(tree)), params.tables(cfg)
    found = {"blocks": 0.0, "head": cfg.vocab_size * cfg.d_model if cfg.head.reads_embedding else 0.0}
    for name, leaf in params.names(tree).items():
        if matrices[name] and name not in tables:
            first = name.split("/")[0]
            place = first.removeprefix("blocks_")
            ffn = layers[int(place) if place.isdigit() else 0].ffn
            # Of stacked experts a token passes through some; everything else serves every token.
            share = ffn.active if "experts" in axes[name] else 1.0
            found["head" if first == "head" else "blocks"] += leaf.size * share
    return found["blocks"], found["head"]


def forward(cfg: ModelConfig, start: int, tokens: int, head: bool = True) -> float:
    """FLOPs of a row's forward pass over `tokens` tokens after `start` others: two per weight of a matrix, and
    attention to as many keys as the layer's pattern lets a query see at most."""
    blocks, last = weights(cfg)
    mixing = sum(layer.mixer.flops(layer, start, tokens) for layer in cfg.layers())
    return 2.0 * tokens * (blocks + (last if head else 0.0)) + mixing


@functools.lru_cache(maxsize=2)
def peak(dtype: str = "float32") -> tuple[float, str]:
    """FLOP/s of all devices together and where the number comes from."""
    device: Any = jax.devices()[0]
    n = jax.device_count()
    if device.device_kind in PEAK:
        return n * PEAK[device.device_kind], f"{n} x {device.device_kind}, data sheet"
    side = 1024
    x = jnp.ones((side, side), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best, f"a measured product of two {side} x {side} {dtype} matrices"
