"""The mask algebra: static, hashable rules for which key a query may see.

A mask is called on integer *in-document* indices that broadcast against each other, on the host (numpy), under
`jit`, or inside a kernel. It can also say, for a rectangle of indices, whether all, none, or some pairs are
visible, so that every backend skips the same tiles. Segments (packed documents) and padding are run-time data and
are applied by the attention backends on top of any mask.

Window semantics, here and nowhere else: ``Causal() & Window(w)`` keeps exactly w keys *including the query's own*,
distances 0 … w - 1.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Tile(enum.IntEnum):
    EMPTY = 0
    PARTIAL = 1
    FULL = 2


@dataclass(frozen=True)
class Mask:
    """Base class. Subclasses define `__call__` and `bounds`."""

    def __call__(self, q: Any, k: Any) -> Any:
        """Boolean visibility of key index `k` for query index `q` (broadcast)."""
        raise NotImplementedError

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        """``(all, any)`` over the closed rectangle ``[q0, q1] x [k0, k1]``: `all` is True only if every pair is
        visible, `any` is False only if none is. When `contiguous` is False only differences ``q - k`` within one
        document are those of the rectangle (packed rows), so a rule on absolute indices must answer (False, True).
        """
        raise NotImplementedError

    @property
    def key_bound(self) -> int | None:
        """No key with an index of this or more is ever visible; None = no such bound."""
        return None

    def tile(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> Tile:
        """What the closed rectangle holds; PARTIAL whenever in doubt."""
        every, some = self.bounds(q0, q1, k0, k1, contiguous)
        return Tile.FULL if every else Tile.PARTIAL if some else Tile.EMPTY

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)


@dataclass(frozen=True)
class Full(Mask):
    """Every key is visible (bidirectional attention)."""

    def __call__(self, q: Any, k: Any) -> Any:
        return (q - k) == (q - k)

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        return True, True


@dataclass(frozen=True)
class Causal(Mask):
    """``k <= q``."""

    def __call__(self, q: Any, k: Any) -> Any:
        return k <= q

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        return k1 <= q0, k0 <= q1


@dataclass(frozen=True)
class Window(Mask):
    """``q - k < width``; a rule on distance only, so it says nothing about the future."""

    width: int

    def __call__(self, q: Any, k: Any) -> Any:
        return q - k < self.width

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        return q1 - k0 < self.width, q0 - k1 < self.width


@dataclass(frozen=True)
class Sinks(Mask):
    """``k < n``: the first n tokens of the document."""

    n: int

    def __call__(self, q: Any, k: Any) -> Any:
        return (k < self.n) & (q == q)

    @property
    def key_bound(self) -> int | None:
        return self.n

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        return (k1 < self.n, k0 < self.n) if contiguous else (False, self.n > 0)


class Prefix(Sinks):
    """The first n tokens as a prefix every query sees, forward in time too (prefix language models)."""


@dataclass(frozen=True)
class Chunked(Mask):
    """Query and key lie in the same chunk of `size` tokens."""

    size: int

    def __call__(self, q: Any, k: Any) -> Any:
        return q // self.size == k // self.size

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        if not contiguous:
            return False, q0 - k1 < self.size and k0 - q1 < self.size
        a, b, c, d = (i // self.size for i in (q0, q1, k0, k1))
        return a == b == c == d, a <= d and c <= b


@dataclass(frozen=True)
class NearChunks(Mask):
    """The key's chunk of `size` tokens lies less than `n` chunks before the query's; says nothing about the future."""

    size: int
    n: int

    def __call__(self, q: Any, k: Any) -> Any:
        return q // self.size - k // self.size < self.n

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        if not contiguous:  # distances of up to (n - 1) * size always qualify, those of n * size and more never
            return q1 - k0 <= (self.n - 1) * self.size, q0 - k1 < self.n * self.size
        a, b, c, d = (i // self.size for i in (q0, q1, k0, k1))
        return b - c < self.n, a - d < self.n


@dataclass(frozen=True)
class EarlyQueries(Mask):
    """``q < n``: only the first n queries of a document see anything."""

    n: int

    def __call__(self, q: Any, k: Any) -> Any:
        return (q < self.n) & (k == k)

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        return (q1 < self.n, q0 < self.n) if contiguous else (False, self.n > 0)


@dataclass(frozen=True)
class And(Mask):
    a: Mask
    b: Mask

    def __call__(self, q: Any, k: Any) -> Any:
        return self.a(q, k) & self.b(q, k)

    @property
    def key_bound(self) -> int | None:
        return min((b for b in (self.a.key_bound, self.b.key_bound) if b is not None), default=None)

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        (a_all, a_any), (b_all, b_any) = (m.bounds(q0, q1, k0, k1, contiguous) for m in (self.a, self.b))
        return a_all and b_all, a_any and b_any


@dataclass(frozen=True)
class Or(Mask):
    a: Mask
    b: Mask

    def __call__(self, q: Any, k: Any) -> Any:
        return self.a(q, k) | self.b(q, k)

    @property
    def key_bound(self) -> int | None:
        bounds = [b for b in (self.a.key_bound, self.b.key_bound) if b is not None]
        return max(bounds) if len(bounds) == 2 else None

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        (a_all, a_any), (b_all, b_any) = (m.bounds(q0, q1, k0, k1, contiguous) for m in (self.a, self.b))
        return a_all or b_all, a_any or b_any


@dataclass(frozen=True)
class Not(Mask):
    a: Mask

    def __call__(self, q: Any, k: Any) -> Any:
        return ~self.a(q, k)

    def bounds(self, q0: int, q1: int, k0: int, k1: int, contiguous: bool = True) -> tuple[bool, bool]:
        every, some = self.a.bounds(q0, q1, k0, k1, contiguous)
        return not some, not every
