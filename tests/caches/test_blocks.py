"""Blocks by the generic suite; their summaries are in tests/patterns/test_longheads.py."""

from __future__ import annotations

import dataclasses

from cases.cache_case import CacheCase

from lm.caches.blocks import BlockMemory, BlocksState
from lm.plug import Model, table
from lm.positions.rope import Rope


class _OfChunks(BlockMemory):
    """For layers whose pattern asks for summaries of chunks of 4 tokens."""

    def init(self, cfg: Model, batch: int, capacity: int) -> BlocksState:
        pattern = table("lm.patterns")["longheads"](4, 12)
        changed = dataclasses.replace(cfg, pattern=pattern, positions=Rope(fraction=0.7))  # an even number of channels
        return super().init(changed, batch, capacity)


class TestBlocks(CacheCase):
    plug = _OfChunks()
