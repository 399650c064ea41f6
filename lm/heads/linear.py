"""The linear language-model head, tied to the embedding table or with a matrix of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import weights
from lm.config import ModelConfig
from lm.errors import UserError
from lm.heads.cross_entropy import Sums, linear_loss
from lm.weights.project import row_axes

AXES = {"head/kernel": ("embed", "vocab"), "head/bias": ("vocab",)}


@dataclass(frozen=True)
class Linear:
    """`tie`: logits are products with the embedding table; `softcap`: ``c tanh(logits / c)``."""

    tie: bool = True
    bias: bool = False
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"model.head.softcap: must be positive or None, found {self.softcap}")

    def module(self, cfg: ModelConfig, name: str | None = None) -> nn.Module:
        return _Linear(cfg, name=name)

    def loss(
        self,
        cfg: ModelConfig,
        params: dict[str, Any],
        hidden_BTD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
        z_loss: float,
        chunk: int,
    ) -> tuple[jax.Array, Sums]:
        """Cross-entropy and its gradient in one pass; see `lm.heads.cross_entropy.linear_loss`."""
        own = params.get("head", {})
        table = weights.dense(params["embed"]) if self.tie else weights.dense(own["kernel"]).T
        bias = own["bias"] if self.bias else None
        counts = weights_BT.astype(jnp.float32)
        return linear_loss(
            hidden_BTD, table, bias, targets_BT, counts, softcap=self.softcap, z_loss=z_loss, chunk=chunk
        )


class _Linear(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, h: jax.Array, table_VD: jax.Array) -> jax.Array:
        cfg, head = self.cfg, self.cfg.head
        if head.tie:
            logits = weights.transposed(h, table_VD)
        else:
            init = nn.initializers.normal(cfg.init_std)
            kernel = weights.param(self, "kernel", init, (cfg.d_model, cfg.vocab_size), cfg.param_dtype)
            flat = weights.product(h.reshape(*row_axes(h.shape[:-1]), cfg.d_model), kernel, 1, jnp.float32)
            logits = flat.reshape(*h.shape[:-1], -1)
        if head.bias:
            bias = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,), cfg.param_dtype)
            logits = logits + bias.astype(jnp.float32)
        return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)
