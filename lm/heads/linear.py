"""The linear language-model head, tied to the embedding table or with a matrix of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import weights
from lm.errors import UserError
from lm.heads.base import Head, Sums, Targets
from lm.heads.cross_entropy import linear_loss
from lm.plug import Model
from lm.weights.project import row_axes


@dataclass(frozen=True)
class Linear(Head):
    """`tie`: logits are products with the embedding table; `softcap`: ``c tanh(logits / c)``."""

    tie: bool = True
    bias: bool = False
    softcap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"model.head.softcap: must be positive or None, found {self.softcap}")

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        return _Linear(cfg, name=name)

    @property
    def reads_embedding(self) -> bool:
        return self.tie

    def loss(self, cfg: Model, params: Mapping[str, Any], over: Targets) -> tuple[jax.Array, Sums]:
        """Cross-entropy and its gradient in one pass; see `lm.heads.cross_entropy.linear_loss`."""
        own = params.get("head", {})
        table = weights.dense(params["embed"]) if self.tie else weights.dense(own["kernel"]).T
        return linear_loss(over, table, own["bias"] if self.bias else None, softcap=self.softcap)


class _Linear(nn.Module):
    cfg: Model

    @nn.compact
    def __call__(self, h: jax.Array, table_VD: jax.Array) -> jax.Array:
        cfg, head = self.cfg, self.cfg.head
        if head.tie:
            logits = weights.transposed(h, table_VD)
        else:
            init = nn.initializers.normal(cfg.init_std)
            shape, of = (cfg.d_model, cfg.vocab_size), cfg.param_dtype
            kernel = weights.param(self, "kernel", init, shape, of, axes=("embed", "vocab"))
            flat = weights.product(h.reshape(*row_axes(h.shape[:-1]), cfg.d_model), kernel, 1, jnp.float32)
            logits = flat.reshape(*h.shape[:-1], -1)
        if head.bias:
            zeros, wide = nn.initializers.zeros, (cfg.vocab_size,)
            bias = weights.param(self, "bias", zeros, wide, cfg.param_dtype, axes=("vocab",))
            logits = logits + bias.astype(jnp.float32)
        return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)
