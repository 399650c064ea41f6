"""The decoder every method runs on: embed -> blocks -> norm -> head.

Read this file first. It names no method: what a layer sees, how positions enter, how channels mix and what the head
computes are plugs of the configuration (`lm.config.ModelConfig`). Everything that is not a parameter is an argument
and a result. What a layer is stands in `block`, how a stack of them is run in `run_layers`. Letters: B batch, T tokens,
D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.caches import Caches
from lm.config import ModelConfig
from lm.layer import LayerInputs
from lm.model.embed import embed
from lm.model.inputs import Inputs
from lm.model.output import Output
from lm.model.run_layers import run_layers
from lm.sharding.layout import shard_stream
from lm.watch import Watch

Params = dict[str, Any]


class Decoder(nn.Module):
    """A decoder-only language model; ``Decoder(cfg).apply({"params": p}, Inputs(tokens_BT))``.

    Layers of equal parameter shapes are stored stacked (``blocks``, leading axis L) whatever plugs run on them, so
    configurations that differ only in training-free plugs share one parameter tree; otherwise ``blocks_0 … L-1``.
    The second layout is taken for the first where it is given (`lm.model.params.unstack`): decoding copies no slices.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        inputs: Inputs,
        cache: Caches | None = None,
        watch: Watch = Watch(),  # noqa: B008  (frozen)
        commit: bool = True,
    ) -> Output:
        """Runs the model. `cache` (from `lm.caches.init`) holds earlier calls' tokens; without `commit` it stays as it
        is, and what it would have kept comes back as `Output.fresh`."""
        inputs.check(cache is not None, commit)
        cfg = self.cfg
        x, table = embed(self, cfg, inputs)
        tokens = inputs.tokens(x.shape[:2], cfg.positions)
        length = jnp.max(jnp.where(tokens.index_BT >= 0, tokens.positions_BT, 0.0)) + 1.0
        x = shard_stream(cfg.positions.absolute(self, cfg, x, tokens.positions_BT))
        layer = LayerInputs(tokens, length, inputs.tokens_BT, inputs.key, watch, commit)
        x, layers = run_layers(self, cfg, x, layer, cache)
        x = shard_stream(cfg.norm.module(cfg.param_dtype, name="final_norm")(x), inside=True)
        head = cfg.head.module(cfg, name="head")
        logits = head(x, table) if watch.logits or self.is_initializing() else None
        return Output(
            logits if watch.logits else None,
            x,
            tuple(out.cache for out in layers) if cache is not None else None,
            tuple(out.taps for out in layers),
            tuple(out.report for out in layers),
            tuple(out.fresh for out in layers) if not commit else None,
        )


def readout(cfg: ModelConfig, params: Mapping[str, Any], hidden: jax.Array) -> jax.Array:
    """Logits float32 ``[..., V]`` of final hidden states ``[..., D]``: the head alone, for callers going by pieces."""
    logits: jax.Array = cfg.head.module(cfg).apply({"params": params.get("head", {})}, hidden, params["embed"])
    return logits
