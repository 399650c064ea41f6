"""Texts that a surgery may look at, and a model taken apart layer by layer while it does.

Compression methods of one layer at a time want the layer's inputs *after* the layers before it have been changed
(GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774). `Calibration.layers` goes through the blocks in order: each
`LayerView` gives the inputs of its linear layers, takes new weights, and passes on what the changed layer computes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.data.texts import Document, documents, identity
from lm.data.tokenizers import Tokenizer
from lm.errors import UserError
from lm.layer import LayerInputs, LayerOut
from lm.model.block import Block
from lm.model.embed import embed
from lm.model.inputs import Inputs
from lm.model.params import unstack
from lm.model.taps import Taps, named
from lm.plug import bounded, check_bounds
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
        tree, tokens = unstack(params), inputs.tokens(self.tokens_BT.shape, cfg.positions)
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
        return self.cfg.positions.absolute(
            self, self.cfg, x_BTD, inputs.tokens(x_BTD.shape[:2], self.cfg.positions).positions_BT
        )


@dataclass(frozen=True)
class CalibrationText:
    """Which text a surgery looks at, as a field of its plug: the first `rows` rows of `length` tokens of `texts` (specs
    of `lm.data.texts`), taken from them in turn."""

    texts: tuple[str, ...] = ("kjv:Genesis",)
    rows: int = bounded(16, at_least=1)
    length: int = bounded(128, at_least=1)

    def __post_init__(self) -> None:
        check_bounds(self, "surgery.calibration")

    def documents(self) -> list[Document]:
        """What is read. Raises `UserError` for texts that there are not."""
        return [document for spec in self.texts for document in documents(spec)]

    def identity(self) -> str:
        """A hash of the texts."""
        return identity(self.documents())

    def read(self, tokenizer: Tokenizer | None) -> Calibration:
        """The rows. Raises `UserError` where the checkpoint has no tokenizer, and where the texts are too short."""
        if tokenizer is None:
            raise UserError("surgery.calibration: the checkpoint has no tokenizer; valid: one that has")
        cut: list[list[list[int]]] = []
        for document in self.documents():
            ids = tokenizer.encode_text(document.text)
            cut.append([list(ids[i : i + self.length]) for i in range(0, len(ids) - self.length + 1, self.length)])
        in_turn = [row for rows in itertools.zip_longest(*cut) for row in rows if row is not None]
        if len(in_turn) < self.rows:
            raise UserError(
                f"surgery.calibration.rows: {self.rows} of {self.length} tokens asked for, {', '.join(self.texts)} has "
                f"{len(in_turn)}; valid: fewer or shorter rows, or more texts"
            )
        return Calibration(jnp.asarray(in_turn[: self.rows], jnp.int32))


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
