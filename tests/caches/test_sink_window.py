"""Sinks and a ring by the generic suite."""

from __future__ import annotations

from cases.cache_case import CacheCase

from lm.caches.sink_window import SinkWindow


class TestSinkWindow(CacheCase):
    plug = SinkWindow(sinks=2, window=5)

    def must_keep(self, last: int) -> set[int]:
        return {i for i in range(last + 1) if i < 2 or i > last - 5}


class TestNoSinks(CacheCase):
    plug = SinkWindow(sinks=0, window=3)

    def must_keep(self, last: int) -> set[int]:
        return {i for i in range(last + 1) if i > last - 3}
