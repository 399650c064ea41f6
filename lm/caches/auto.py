"""The smallest cache that loses nothing under the layer's pattern."""

from __future__ import annotations

from dataclasses import dataclass

from lm.caches.base import Cache, State
from lm.caches.blocks import BlockMemory
from lm.caches.codec import Quantize
from lm.caches.full import Full
from lm.caches.sink_window import SinkWindow
from lm.plug import Model


@dataclass(frozen=True)
class Auto(Cache):
    """Blocks with summaries for a pattern that asks for summaries, the first and the last tokens for one that sees no
    others, else every token; `quantize`: None or ``int8`` (`lm.caches.codec`)."""

    quantize: Quantize | None = None

    def chosen(self, cfg: Model, capacity: int) -> Cache:
        """The cache of a layer."""
        if cfg.pattern.summary is not None:
            return BlockMemory(self.quantize)
        kept = cfg.pattern.kept
        if kept is None or kept[0] >= capacity:
            return Full(None, self.quantize)
        return SinkWindow(kept[0], min(kept[1], capacity - kept[0]), self.quantize)

    def init(self, cfg: Model, batch: int, capacity: int) -> State:
        return self.chosen(cfg, capacity).init(cfg, batch, capacity)
