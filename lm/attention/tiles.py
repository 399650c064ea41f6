"""Which (query block, key block) tiles a mask leaves to compute: decided on the host, before tracing."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from lm.attention.masks import Mask, Tile

# Logits of one tile over all rows and heads, float32: what the second-level caches of a few CPU cores hold.
CPU_TILE = 2**19.5


@dataclass(frozen=True)
class Grid:
    """Static geometry of a blocked call. `offset` is the row of the first query among the keys."""

    n_queries: int
    n_keys: int
    block_q: int
    block_k: int
    offset: int = 0
    contiguous: bool = True
    aligned: bool = True

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.n_queries // self.block_q), -(-self.n_keys // self.block_k)


def block(rows: int, platform: str) -> tuple[int, int]:
    """Queries and keys of a tile where the config names none; `rows` = batch * heads.

    On the CPU a tile's logits stay in the cache, so its side, a power of two from 64 to 512, falls with the rows: 64
    for a training batch of 128 rows, 256 (and 512 keys, which is as fast forward) for one long text of 9. Accelerators
    get one size.
    """
    if platform != "cpu":
        return 256, 512
    side = 2 ** round(math.log2(CPU_TILE / rows) / 2)
    side = min(max(side, 64), 512)
    return side, (side if side < 256 else 512)


@functools.lru_cache(maxsize=256)
def visit(mask: Mask, grid: Grid) -> np.ndarray:
    """int32 ``[n, 3]`` rows (query block, key block, whole): the non-empty tiles, query-major.

    `whole` is 1 where every pair is visible and inside the arrays, so that the mask need not be evaluated. Queries and
    keys that are not the same rows in the same order (`aligned` False) give every tile as partial.
    """
    n_q, n_k = grid.blocks
    out = []
    for i in range(n_q):
        q0 = grid.offset + i * grid.block_q
        q1 = min(q0 + grid.block_q, grid.offset + grid.n_queries) - 1
        for j in range(n_k):
            k0, k1 = j * grid.block_k, min((j + 1) * grid.block_k, grid.n_keys) - 1
            kind = mask.tile(q0, q1, k0, k1, grid.contiguous) if grid.aligned else Tile.PARTIAL
            if kind != Tile.EMPTY:
                inside = k1 == (j + 1) * grid.block_k - 1
                out.append((i, j, int(kind == Tile.FULL and inside and grid.contiguous)))
    return np.array(out, np.int32).reshape(-1, 3)
