"""The full cache by the generic suite, as it is and in int8."""

from __future__ import annotations

from cases.cache_case import CacheCase, N

from lm.caches.full import Full


class TestFull(CacheCase):
    plug = Full(N)


class TestInt8(CacheCase):
    """Half a step of 127 at most."""

    plug = Full(N, "int8")
    close = 0.5 / 127
