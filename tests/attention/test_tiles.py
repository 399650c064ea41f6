"""Tiles: how many are visited, what they cost, and how large they are."""

from __future__ import annotations

import itertools

from lm.attention.masks import Causal, Full, Mask, Sinks, Window
from lm.attention.tiles import Grid, block, visit


def test_a_tile_that_ends_beyond_the_keys_is_never_whole() -> None:
    whole = visit(Full(), Grid(20, 20, 8, 8))
    assert whole.tolist() == [[i, j, int(j < 2)] for i in range(3) for j in range(3)]


def test_a_window_costs_by_its_width_and_sinks_by_their_number() -> None:
    def tiles(mask: Mask, n: int) -> int:
        return len(visit(mask, Grid(n, n, 64, 64)))

    near, far = Causal() & Window(256), Sinks(10) & ~Window(256)
    for mask, each in ((near, 5), (far, 1)):
        assert tiles(mask, 16384) - tiles(mask, 8192) == 128 * each
    assert tiles(Causal(), 8192) == 128 * 129 // 2


def test_tiles_shrink_with_the_rows_and_stay_within_limits() -> None:
    sides = [block(rows, "cpu") for rows in range(1, 5000)]
    assert all(q & (q - 1) == 0 and 64 <= q <= k <= 512 for q, k in sides)
    assert all(a >= b for a, b in itertools.pairwise(sides))
    assert sides[0] == (512, 512) and sides[8] == (256, 512) and sides[127] == (64, 64) == sides[-1]
    assert block(1, "tpu") == block(4096, "gpu") == (256, 512)
