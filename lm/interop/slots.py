"""The tensors that parameters are made of: one per layer and expert, as files have them."""

from __future__ import annotations

import math

from lm.config import ModelConfig
from lm.interop.families.table import Table
from lm.model import params as params_lib

Slot = tuple[str, int | None, int | None]  # name within the layer (or whole name), layer, expert
Index = tuple[int, ...]  # of a tensor in the parameter that stacks it


def slots(cfg: ModelConfig, table: Table | None = None) -> dict[str, list[tuple[Slot, Index]]]:
    """Of every parameter, in order: its tensors and where in it they are. With the `table` of a family, experts that
    its files keep in one tensor are one."""
    tree = params_lib.abstract(cfg)
    stacked = params_lib.names(params_lib.axes(cfg).stacks(tree))
    return {name: _of(name, leaf.shape, stacked[name], table) for name, leaf in params_lib.names(tree).items()}


def _of(name: str, shape: tuple[int, ...], stacked: int, table: Table | None) -> list[tuple[Slot, Index]]:
    block, _, rest = name.partition("/")
    if block == "blocks":  # all layers in one array
        layers: list[tuple[int | None, Index]] = [(i, (i,)) for i in range(shape[0])]
    elif block.startswith("blocks_"):  # layers of different shapes: one tree each
        layers = [(int(block.removeprefix("blocks_")), ())]
    else:
        rest, layers = name, [(None, ())]
    first = len(layers[0][1])  # axes that number layers
    if stacked == first or (table is not None and "{e}" not in table[rest][0]):
        return [((rest, i, None), at) for i, at in layers]
    return [((rest, i, e), (*at, e)) for i, at in layers for e in range(shape[first])]


def flat_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor, by its name within a layer, without the axes of heads: matrices ``[in, out]``, biases
    ``[out]``."""
    if not ours.startswith("attn/") or not ours.endswith(("/bias", "/kernel")):
        return shape
    if ours.endswith("/bias"):
        return (math.prod(shape),)
    return (math.prod(shape[:-1]), shape[-1]) if "/o/" in ours else (shape[0], math.prod(shape[1:]))
