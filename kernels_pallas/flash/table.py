"""The table of tiles a kernel walks: one int32 per tile, prefetched into scalar memory; and the memory of a step."""

from __future__ import annotations

import jax
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


def runs(tiles: np.ndarray, n_major: int, major: int) -> tuple[np.ndarray, np.ndarray, tuple[bool, bool]]:
    """What a GPU's blocks of threads walk: ``starts [n_major, 4]``, ``runs [n, 2]``, and which kinds of run there are.

    `tiles` ``[n, 3]``: (query, key, whole). A row of `starts` is ``(block, a, b, c)``, a block of column `major`. Its
    whole tiles are in ``runs[a:b]``, its partial tiles in ``runs[b:c]``. A run is ``(first, end)`` of neighbouring
    blocks of the other column. The blocks with the most tiles come first. The kinds: whole, partial.
    """
    minor = 1 - major
    order = np.lexsort((tiles[:, minor], 1 - tiles[:, 2], tiles[:, major]))
    block, tile, whole = (tiles[order, c].astype(np.int64) for c in (major, minor, 2))
    new = np.r_[True, (np.diff(block) != 0) | (np.diff(whole) != 0) | (np.diff(tile) != 1)][: len(tile)]
    at = np.flatnonzero(new)
    found = np.stack([tile[at], np.r_[tile[at[1:] - 1], tile[-1:]] + 1], 1) if len(at) else np.zeros((1, 2))
    key = 2 * block[at] + (1 - whole[at])  # of a run, ascending
    edges = np.searchsorted(key, np.stack([2 * np.arange(n_major), 2 * np.arange(n_major) + 1], 1))
    starts = np.concatenate([np.arange(n_major)[:, None], edges, np.r_[edges[1:, :1], [[len(at)]]]], 1)
    heavy = np.argsort(-np.bincount(block, minlength=n_major), kind="stable")
    return starts[heavy].astype(np.int32), found.astype(np.int32), (bool(whole.any()), bool((1 - whole).any()))


def q_block(word: jax.Array) -> jax.Array:
    return word >> 17


def k_block(word: jax.Array) -> jax.Array:
    return (word >> 4) & (2**13 - 1)


def tile_bytes(block_q: int, block_k: int, d: int, itemsize: int, backward: bool = False) -> int:
    """Fast memory of one grid step, estimated: blocks in flight twice, accumulators, float32 tiles; padded to lanes."""
    width = -(-d // LANES) * LANES
    n_q, n_k = (2, 4) if backward else (2, 2)  # q, dO | k, v, dk, dv ; q, out | k, v
    blocks = 2 * itemsize * width * (n_q * block_q + n_k * block_k)
    sums = 4 * (2 * block_k * width if backward else block_q * (width + 2 * LANES))
    return blocks + sums + (5 if backward else 3) * 4 * block_q * block_k
