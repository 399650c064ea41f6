"""Blocks by the generic suite; their summaries are in tests/patterns/test_longheads.py."""

from __future__ import annotations

from cases.cache_case import CacheCase, N

from lm.caches.blocks import Blocks
from lm.plug import table


class TestBlocks(CacheCase):
    plug = Blocks(N, 2, table("lm.patterns")["longheads"](4, 12).summary)
