"""Texts that a surgery may look at, and a model taken apart layer by layer while it does.

Compression methods of one layer at a time want the layer's inputs *after* the layers before it have been changed
(GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774). `Calibration.layers` goes through the blocks in order: each
`LayerView` gives the inputs of its linear layers, takes new weights, and passes on what the changed layer computes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.layer import LayerInputs, LayerOut
from lm.model.block import Block
from lm.model.embed import embed
from lm.model.inputs import Inputs
from lm.model.params import unstack
from lm.model.taps import Taps, named
from lm.watch import Reduce, Watch

Params = Any


@dataclass
class LayerView:
    """Layer `i` of a model under surgery: its configuration, its parameters, and what comes into it.

    `params` may be given other leaves; what goes on to the next layer is computed with them.
    """

    i: int
    cfg: ModelConfig
    params: Params
    x_BTD: jax.Array = field(repr=False)
    _layer: LayerInputs = field(repr=False)

    def inputs(self, reduce: Reduce | None = None) -> Taps:
        """What comes into every linear layer, by its name (``attn/q``, ``ffn/down``): ``[B, T, …]``, or reduced over
        tokens (`lm.watch.Watch`); ``gram`` gives ``X^T X``."""
        watch = Watch(taps=("*/input",), reduce=reduce)
        found = _taps(self.cfg, watch, self.params, self.x_BTD, self._layer)
        return {name.removesuffix("/input"): x for name, x in found.items()}

    def output(self) -> jax.Array:
        """The stream ``[B, T, D]`` after the layer, with its present parameters."""
        return _output(self.cfg, self.params, self.x_BTD, self._layer)


@dataclass(frozen=True)
class Calibration:
    """Token ids int32 ``[B, T]`` of texts that nobody measures on; equal lengths, no padding."""

    tokens_BT: jax.Array

    def layers(self, cfg: ModelConfig, params: Params) -> Iterator[LayerView]:
        """The layers in order, each with the inputs that the changed layers before it give."""
        inputs = Inputs(self.tokens_BT)
        tree, tokens = unstack(params), inputs.tokens(self.tokens_BT.shape)
        x_BTD = _embedded(cfg, tree, self.tokens_BT)
        layer = LayerInputs(tokens, jnp.max(tokens.positions_BT) + 1.0, self.tokens_BT)
        for i, own in enumerate(cfg.layers()):
            view = LayerView(i, own, tree[f"blocks_{i}"], x_BTD, layer)
            yield view
            x_BTD = view.output()

    def changed(self, cfg: ModelConfig, params: Params, views: list[LayerView]) -> Params:
        """The parameters with those of the views in the place of their layers: one tree per layer."""
        return {**unstack(params), **{f"blocks_{view.i}": view.params for view in views}}


class _Start(nn.Module):
    """What is before the first layer."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, inputs: Inputs) -> jax.Array:
        x_BTD, _ = embed(self, self.cfg, inputs)
        return self.cfg.positions.absolute(self, self.cfg, x_BTD, inputs.tokens(x_BTD.shape[:2]).positions_BT)


@functools.partial(jax.jit, static_argnums=0)
def _embedded(cfg: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    out: jax.Array = _Start(cfg).apply({"params": params}, Inputs(tokens_BT))
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _taps(cfg: ModelConfig, watch: Watch, params: Params, x: jax.Array, layer: LayerInputs) -> Taps:
    layer = dataclasses.replace(layer, watch=watch)
    _, made = Block(cfg).apply({"params": params}, x, layer, None, mutable=["taps"])
    return named(made.get("taps", {}))


@functools.partial(jax.jit, static_argnums=0)
def _output(cfg: ModelConfig, params: Params, x: jax.Array, layer: LayerInputs) -> jax.Array:
    out: LayerOut = Block(cfg).apply({"params": params}, x, layer, None)
    return out.x
