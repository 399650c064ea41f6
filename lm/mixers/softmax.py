"""Grouped-query softmax attention (arXiv 1706.03762, 2305.13245); the pattern decides what is seen, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from lm.attention.attend import BACKENDS, attend
from lm.attention.backends import pallas
from lm.attention.branches import Context, Tokens
from lm.config import ModelConfig
from lm.errors import UserError, unknown
from lm.weights.project import Project

AXES = {
    "q/kernel": ("embed", "heads", "head_dim"),
    "q/bias": ("heads", "head_dim"),
    "k/kernel": ("embed", "kv_heads", "head_dim"),
    "k/bias": ("kv_heads", "head_dim"),
    "v/kernel": ("embed", "kv_heads", "head_dim"),
    "v/bias": ("kv_heads", "head_dim"),
    "o/kernel": ("heads", "head_dim", "embed"),
    "o/bias": ("embed",),
    "q_norm/scale": ("head_dim",),
    "q_norm/bias": ("head_dim",),
    "k_norm/scale": ("head_dim",),
    "k_norm/bias": ("head_dim",),
}


@dataclass(frozen=True)
class SoftmaxAttention:
    """Settings that do not change with the pattern.

    `backend`: ``auto | dense | blocked | pallas``; `block_q`, `block_k`: tile of the last two, tokens, None = by the
    number of rows and heads (`lm.attention.tiles.block`) or the kernel's own; `softcap`: logits become
    ``c tanh(logits / c)``; `qk_norm`: normalise queries and keys per head before positions; `scale`: logit scale,
    None = ``head_dim ** -0.5``.
    """

    backend: str = "auto"
    block_q: int | None = None
    block_k: int | None = None
    softcap: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None

    def check(self, cfg: ModelConfig) -> None:
        if self.backend not in BACKENDS:
            raise unknown("model.mixer.backend", self.backend, BACKENDS)
        if self.backend == "pallas":
            pallas.check(cfg.pattern)
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"model.mixer.{name}: must be at least 1 or None, found {size}")
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"model.mixer.softcap: must be positive or None, found {self.softcap}")

    def module(self, cfg: ModelConfig, name: str | None = None) -> nn.Module:
        return _Attention(cfg, name=name)


def _own(tokens: Tokens) -> jax.Array:
    return tokens.positions_BT


class _Attention(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, length: jax.Array, cache: Any = None) -> tuple[jax.Array, Any]:
        cfg, a = self.cfg, self.cfg.mixer
        D, H, K, d = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        assert K is not None and d is not None
        q = Project((D, H, d), 1, a.qkv_bias, cfg, name="q")(x_BTD)
        k = Project((D, K, d), 1, a.qkv_bias, cfg, name="k")(x_BTD)
        v = Project((D, K, d), 1, a.qkv_bias, cfg, name="v")(x_BTD)
        if a.qk_norm:
            q = cfg.norm.module(cfg.param_dtype, name="q_norm")(q)
            k = cfg.norm.module(cfg.param_dtype, name="k_norm")(k)
        keys, rotated = tokens, False
        positions = cfg.positions.bind(cfg)
        if cache is not None:
            rotated = cache.rotated
            places = getattr(cache, "places", _own)(tokens)
            k = positions.rotate(k, places[:, :, None], length) if rotated else k
            cache, k, v, keys = cache.extend(k, v, tokens)
        scale = a.scale if a.scale is not None else d**-0.5
        ctx = Context(q, k, tokens, keys, positions, length, scale, rotated, v)
        if hasattr(cache, "summarise"):
            cache, ctx = cache.summarise(ctx)
        branches = cfg.pattern.branches(ctx)
        if self.is_mutable_collection("records") and hasattr(cfg.pattern, "records"):
            for name, value in cfg.pattern.records(ctx, branches).items():
                self.sow("records", name, value, reduce_fn=lambda _, x: x, init_fn=lambda: None)
        out, _ = attend(
            ctx,
            v,
            branches,
            softcap=a.softcap,
            backend=a.backend,
            block_q=a.block_q,
            block_k=a.block_k,
        )
        y = Project((H, d, D), 2, a.out_bias, cfg, name="o")(out.astype(x_BTD.dtype))
        return y, cache
