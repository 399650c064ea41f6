"""Learned absolute positions, added to the token embeddings (GPT-2)."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import weights
from lm.plug import Model, bounded
from lm.positions.base import Positions


@dataclass(frozen=True)
class Learned(Positions):
    """A table of `size` rows. Positions are rounded down and clipped to the table."""

    size: int = bounded(1024, at_least=1)

    @property
    def limit(self) -> int:
        return self.size

    def absolute(self, scope: nn.Module, cfg: Model, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        shape, init = (self.size, cfg.d_model), nn.initializers.normal(cfg.init_std)
        table = weights.param(scope, "pos_embed", init, shape, cfg.param_dtype, axes=("positions", "embed"))
        rows = jnp.clip(jnp.floor(positions_BT), 0, self.size - 1).astype(jnp.int32)
        return x_BTD + weights.rows(table, rows).astype(x_BTD.dtype)
