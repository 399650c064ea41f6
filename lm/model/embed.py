"""From tokens to the residual stream."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import weights
from lm.config import ModelConfig
from lm.model.inputs import Inputs
from lm.sharding.layout import constrain
from lm.weights.lookup import lookup


def embed(scope: nn.Module, cfg: ModelConfig, inputs: Inputs) -> tuple[jax.Array, weights.AnyWeight]:
    """The stream ``[B, T, D]`` before the first layer, and the embedding table ``[V, D]``; parameters are declared on
    `scope`. The rows are multiplied by `ModelConfig.embed_scale` (Gemma: the square root of the width)."""
    dtype, init = jnp.dtype(cfg.dtype), nn.initializers.normal(cfg.init_std)
    shape, axes = (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
    table = weights.param(scope, "embed", init, shape, cfg.param_dtype, axes=axes)
    rows = inputs.embeddings_BTD
    if rows is None:
        assert inputs.tokens_BT is not None
        rows = lookup(table, inputs.tokens_BT, dtype)
    x_BTD = constrain(rows.astype(dtype), "batch", "length", None)
    return x_BTD if cfg.embed_scale == 1.0 else x_BTD * jnp.asarray(cfg.embed_scale, dtype), table
