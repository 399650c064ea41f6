"""Property tests of the mask algebra against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.attention.masks import (
    And,
    Causal,
    Chunked,
    EarlyQueries,
    Full,
    Mask,
    NearChunks,
    Not,
    Or,
    Prefix,
    Sinks,
    Tile,
    Window,
)
from lm.attention.tiles import Grid, visit

small = st.integers(0, 24)
leaves = st.one_of(
    st.just(Causal()),
    st.just(Full()),
    st.builds(Window, st.integers(1, 24)),
    st.builds(Sinks, small),
    st.builds(Prefix, small),
    st.builds(Chunked, st.integers(1, 9)),
    st.builds(NearChunks, st.integers(1, 9), st.integers(1, 4)),
    st.builds(EarlyQueries, small),
)
masks = st.recursive(
    leaves, lambda m: st.one_of(st.builds(And, m, m), st.builds(Or, m, m), st.builds(Not, m)), max_leaves=6
)
rectangles = st.tuples(small, st.integers(0, 9), small, st.integers(0, 9))


def brute(mask: Mask, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
    return np.asarray(mask(np.arange(q0, q1 + 1)[:, None], np.arange(k0, k1 + 1)[None]), bool)


@settings(max_examples=400, deadline=None)
@given(masks, rectangles)
def test_a_tile_never_lies(mask: Mask, box: Any) -> None:
    q0, dq, k0, dk = box
    pairs = brute(mask, q0, q0 + dq, k0, k0 + dk)
    kind = mask.tile(q0, q0 + dq, k0, k0 + dk)
    assert kind != Tile.EMPTY or not pairs.any()
    assert kind != Tile.FULL or pairs.all()


@settings(max_examples=300, deadline=None)
@given(masks, rectangles, st.integers(0, 40))
def test_packed_rows_are_judged_by_distance_only(mask: Mask, box: Any, shift: int) -> None:
    """Row numbers say nothing about indices in the document but their difference."""
    q0, dq, k0, dk = box
    kind = mask.tile(q0 + shift, q0 + dq + shift, k0 + shift, k0 + dk + shift, contiguous=False)
    pairs = brute(mask, q0, q0 + dq, k0, k0 + dk)
    assert kind != Tile.EMPTY or not pairs.any()
    assert kind != Tile.FULL or pairs.all()


@settings(max_examples=200, deadline=None)
@given(masks)
def test_no_key_beyond_the_bound(mask: Mask) -> None:
    bound = mask.key_bound
    if bound is not None:
        assert not brute(mask, 0, 60, bound, 60).any()


def test_the_bound_of_a_composed_mask_is_no_larger_than_needed() -> None:
    """Dense attention reads keys up to it."""
    assert (Sinks(3) & Sinks(5)).key_bound == (Causal() & Sinks(3)).key_bound == 3
    assert (Sinks(3) | Sinks(5)).key_bound == 5
    assert (Sinks(3) | Window(2)).key_bound is (~Sinks(3)).key_bound is None


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Causal() & Window(7),
        Causal() & (Window(7) | Sinks(3)),
        Causal() & Window(9) & Window(5),
        Sinks(3) & ~Window(8),
        Causal() | Prefix(5),
    ],
)
def test_shipped_masks_are_judged_exactly(mask: Mask) -> None:
    for q0 in range(0, 30, 3):
        for k0 in range(0, 30, 3):
            pairs = brute(mask, q0, q0 + 3, k0, k0 + 4)
            exact = Tile.FULL if pairs.all() else Tile.PARTIAL if pairs.any() else Tile.EMPTY
            kind = mask.tile(q0, q0 + 3, k0, k0 + 4)
            if exact == Tile.EMPTY:
                assert kind == Tile.EMPTY, (q0, k0)
            # A union may be full by parts that are each partial: then doing the work with a mask is allowed.
            assert kind == exact or (isinstance(mask, And | Or) and kind == Tile.PARTIAL), (q0, k0)


@pytest.mark.parametrize("w", [1, 2, 7, 50])
def test_a_window_keeps_w_keys_including_the_query(w: int) -> None:
    pairs = brute(Causal() & Window(w), 0, 29, 0, 29)
    np.testing.assert_array_equal(pairs.sum(1), np.minimum(np.arange(30) + 1, w))
    assert pairs.diagonal().all()


def test_masks_are_values() -> None:
    assert Causal() & Window(3) == Causal() & Window(3)
    assert hash(~Sinks(2)) == hash(~Sinks(2))
    assert len({Sinks(2), Prefix(2), Window(2), Causal()}) == 4


@pytest.mark.parametrize(
    "mask", [Causal(), Causal() & Window(20), Causal() & (Window(20) | Sinks(3)), Sinks(2) & ~Window(9)]
)
@pytest.mark.parametrize(("n", "bq", "bk", "rows"), [(64, 16, 8, 64), (61, 16, 12, 61), (50, 8, 16, 5)])
def test_visited_tiles_are_those_that_hold_a_pair(mask: Mask, n: int, bq: int, bk: int, rows: int) -> None:
    grid = Grid(rows, n, bq, bk, offset=n - rows)
    got = {(i, j): whole for i, j, whole in visit(mask, grid).tolist()}
    pairs = brute(mask, 0, n - 1, 0, n - 1)[n - rows :]
    for i in range(grid.blocks[0]):
        for j in range(grid.blocks[1]):
            block = pairs[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            assert ((i, j) in got) == bool(block.any())
            if got.get((i, j)):
                assert block.all() and block.shape[1] == bk
    order = [tuple(t) for t in visit(mask, grid)[:, :2].tolist()]
    assert order == sorted(order)


def test_unaligned_calls_skip_nothing() -> None:
    grid = Grid(8, 32, 4, 8, contiguous=False, aligned=False)
    assert len(visit(Causal() & Window(2), grid)) == 8
    assert not visit(Full(), grid)[:, 2].any()
