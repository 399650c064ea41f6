"""The table of tiles a kernel walks: one int32 per tile, prefetched into scalar memory; and the memory of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

RUN, WHOLE, FIRST, LAST = 1, 2, 4, 8
LANES = 128


def pack(tiles: np.ndarray, n_major: int, major: int) -> np.ndarray:
    """int32 ``[n]`` in the order of column `major` (0 queries, 1 keys) of `tiles` ``[n, 3]`` (query, key, whole)."""
    minor = 1 - major
    rest = np.setdiff1d(np.arange(n_major), tiles[:, major])
    empty = np.zeros((len(rest), 3), np.int64)
    empty[:, major] = rest
    rows = np.concatenate([tiles.astype(np.int64), empty])
    run = np.r_[np.ones(len(tiles), np.int64), np.zeros(len(rest), np.int64)]
    order = np.lexsort((rows[:, minor], rows[:, major]))
    rows, run = rows[order], run[order]
    for n in np.flatnonzero(run == 0):  # nothing new is fetched for an entry that computes nothing
        rows[n, minor] = rows[n - 1, minor] if n else 0
    if rows[:, :2].max(initial=0) >= 2**13:
        raise ValueError(f"more than {2**13} blocks on a side: {tuple(rows[:, :2].max(0) + 1)}; use larger blocks")
    first = np.r_[True, rows[1:, major] != rows[:-1, major]]
    last = np.r_[first[1:], True]
    flags = run * RUN + run * rows[:, 2] * WHOLE + first * FIRST + last * LAST
    return (rows[:, 0] << 17 | rows[:, 1] << 4 | flags).astype(np.int32)


def q_block(word: Any) -> Any:
    return word >> 17


def k_block(word: Any) -> Any:
    return (word >> 4) & (2**13 - 1)


def tile_bytes(block_q: int, block_k: int, d: int, itemsize: int, backward: bool = False) -> int:
    """Fast memory of one grid step, estimated: blocks in flight twice, accumulators, float32 tiles; padded to lanes."""
    width = -(-d // LANES) * LANES
    n_q, n_k = (2, 4) if backward else (2, 2)  # q, dO | k, v, dk, dv ; q, out | k, v
    blocks = 2 * itemsize * width * (n_q * block_q + n_k * block_k)
    sums = 4 * (2 * block_k * width if backward else block_q * (width + 2 * LANES))
    return blocks + sums + (5 if backward else 3) * 4 * block_q * block_k
