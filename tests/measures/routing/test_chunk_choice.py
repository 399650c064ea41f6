"""What `chunk_choice` reports, against what is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from cases.measured import CFG, measure, quiet, subject

from lm.config import merge
from lm.errors import UserError
from lm.measures.routing.chunk_choice import chance, hit, spread


def test_chunk_choice_on_a_model() -> None:
    choice = measure("chunk_choice", lengths=(256, 400), depths=(0.3, 0.6), digits=3, filler="kjv:Jude", bins=5)
    made = choice.run(subject(), quiet)
    assert {len(v) for v in made.samples.values()} == {4}
    grid = np.array(made.curves["needle"]["z"])
    assert grid.shape == (3, 4) and made.curves["needle"]["y"] == [0, 1, 2]
    assert grid.mean() == pytest.approx(np.mean(made.samples["hit_rate"]))
    places = np.array(made.curves["places"]["z"])
    assert places.shape == (3, 5)
    np.testing.assert_allclose(places.sum(1), 1.0)
    assert all(b >= h for b, h in zip(made.samples["best_head"], made.samples["hit_rate"], strict=True))


def test_hits_and_places_counted_by_hand() -> None:
    ids = np.array(
        [[[[0, 3, 5, 8, 9]], [[0, 2, 5, 8, 9]]], [[[0, -1, 7, 8, 9]], [[0, 1, 4, 8, 9]]]]
    )  # L=2, T=2, H=1, n=5
    assert hit(ids, {3, 4}).tolist() == [[[True], [False]], [[False], [True]]]
    assert spread(ids, np.array([9, 9]), 3).tolist() == [[1, 3, 0], [1, 1, 1]]  # 0, 8, 9 are given, -1 is none


def test_chance_is_the_share_of_all_picks() -> None:
    own, n = 9, 6
    for wanted in ({4}, {4, 5}, {1, 7}, {3, 8}, {0}, {9}):
        picks = list(itertools.combinations(range(1, own - 1), n - 3))
        hits = sum(bool(wanted & {0, own - 1, own, *p}) for p in picks)
        assert chance(wanted, own, n) == pytest.approx(hits / len(picks))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (64,)}, "measures.chunk_choice.lengths: each must be at least 128"),
        ({"depths": (1.5,)}, "measures.chunk_choice.depths: each must be in"),
        ({"bins": 0}, "measures.chunk_choice.bins: must be at least 1"),
    ],
)
def test_bad_choices_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure("chunk_choice", **fields)


def test_models_without_a_choice_are_refused() -> None:
    causal = merge(CFG, {"pattern": "causal"}, "model")
    with pytest.raises(UserError, match="pattern Causal picks no chunks"):
        measure("chunk_choice").run(subject(causal), quiet)
    wide = merge(CFG, {"pattern": {"begin_selective_length": 400}}, "model")
    with pytest.raises(UserError, match=r"lengths: 256 tokens are all seen"):
        measure("chunk_choice", lengths=(256,)).run(subject(wide), quiet)
