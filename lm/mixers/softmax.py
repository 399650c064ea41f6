"""Grouped-query softmax attention (arXiv 1706.03762, 2305.13245); the pattern decides what is seen, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax

from lm.caches.base import State
from lm.errors import UserError
from lm.layer import LayerInputs, LayerOut
from lm.mixers.attended import attended
from lm.mixers.base import Mixer
from lm.plug import Model, bounded, later
from lm.weights.project import Project
from lm.weights.weight import param

IN, KV, OUT = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim"), ("heads", "head_dim", "embed")


@dataclass(frozen=True)
class SoftmaxAttention(Mixer):
    """Settings that do not change with the pattern.

    `block_q`, `block_k`: tile of the backends that have one, tokens, None = by the number of rows and heads
    (`lm.attention.tiles.block`) or the kernel's own; `softcap`: logits become ``c tanh(logits / c)``; `qk_norm`:
    normalise queries and keys before positions, `qk_norm_over` each ``head`` or the ``width`` of all of them (OLMo 2);
    `scale`: logit scale, None = ``head_dim ** -0.5``; `sink_logits`: every head has a learned logit that takes its
    share of the softmax and gives nothing (gpt-oss, arXiv 2508.10925).
    """

    backend: Literal["auto", "dense", "blocked", "pallas"] = "auto"  # type: ignore[assignment]
    block_q: int | None = bounded(None, at_least=1)
    block_k: int | None = bounded(None, at_least=1)
    softcap: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    qk_norm_over: Literal["head", "width"] = later("head")
    sink_logits: bool = later(False)

    def check(self, cfg: Model) -> None:
        if self.backend == "pallas" and cfg.pattern.lists_keys:
            raise UserError(
                "model.mixer.backend: 'pallas' serves plain branches, and this "
                f"{type(cfg.pattern).__name__} lists keys at run time; valid: auto, dense, blocked"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"model.mixer.softcap: must be positive or None, found {self.softcap}")

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        return _Attention(cfg, name=name)

    def cache(self, cfg: Model, batch: int, capacity: int) -> State:
        state: State = cfg.cache.init(cfg, batch, capacity)
        return state

    def flops(self, cfg: Model, start: int, tokens: int) -> float:
        return float(2 * 2 * cfg.n_heads * cfg.head_width * cfg.pattern.seen(start, tokens))

    def flops_per_token(self, cfg: Model, seq_len: int) -> float:
        return 2 * 2 * cfg.n_heads * cfg.head_width * seq_len / 2

    def between(self, cfg: Model, heads: int, kv_heads: int) -> float:
        # Queries (raw and turned) and what attention gives; keys and values.
        return (3 * cfg.n_heads / heads + 2 * cfg.kv_heads / kv_heads) * cfg.head_width


class _Attention(nn.Module):
    cfg: Model

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer: LayerInputs, cache: State | None = None) -> LayerOut:
        cfg, a = self.cfg, self.cfg.mixer
        D, H, K, d = cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.head_width
        watch = layer.watch
        q = Project((D, H, d), 1, a.qkv_bias, cfg, IN, name="q")(x_BTD, watch)
        k = Project((D, K, d), 1, a.qkv_bias, cfg, KV, name="k")(x_BTD, watch)
        v = Project((D, K, d), 1, a.qkv_bias, cfg, KV, name="v")(x_BTD, watch)
        if a.qk_norm:
            q, k = self._normed("q_norm", q, "heads"), self._normed("k_norm", k, "kv_heads")
        sink_H = None
        if a.sink_logits:
            sink_H = param(self, "sinks", nn.initializers.zeros, (H,), cfg.param_dtype, axes=("heads",))
        scale = a.scale if a.scale is not None else d**-0.5
        positions = cfg.positions.bind(cfg)
        out, cache, new = attended(self, cfg, (q, k, v), positions, scale, layer, cache, a.softcap, sink_H)
        y = Project((H, d, D), 2, a.out_bias, cfg, OUT, name="o")(out.astype(x_BTD.dtype), watch)
        return LayerOut(y, cache, fresh=None if layer.commit else new)

    def _normed(self, name: str, x_BTKd: jax.Array, heads: str) -> jax.Array:
        """Queries or keys, each head normalised or all of a token together."""
        whole = self.cfg.mixer.qk_norm_over == "width"
        norm = self.cfg.norm.module(self.cfg.param_dtype, name=name, axis=heads if whole else "head_dim")
        flat = x_BTKd.reshape(*x_BTKd.shape[:2], -1) if whole else x_BTKd
        normed: jax.Array = norm(flat).reshape(x_BTKd.shape) if whole else norm(flat)
        return normed
