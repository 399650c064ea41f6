"""The tests every way of drawing texts owes: over all texts of a table model, it draws what the model says.

A subclass says how many texts are drawn at once with `draw`; drafting changes how fast, never what.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from cases.budget import Budget
from cases.table_model import LENGTH, TableModel, V, expected_accepted

SIGMAS = 6.0  # of a binomial count; 4,096 texts, so about one test in a hundred thousand fails by chance


class DrafterCase(Budget):
    """`draw`: many texts from one beginning. `drafts`: how many tokens are drafted at a time; 0 = no drafter."""

    drafts: ClassVar[int] = 0
    exact: ClassVar[bool] = True
    N: ClassVar[int] = 40_000
    PROGRAMS: ClassVar[int] = 2

    target = TableModel.random(0, 1.2)
    drafter = TableModel.random(1, 1.0)

    def draw(self, target: TableModel, drafter: TableModel, last: int, n: int, seed: int) -> tuple[np.ndarray, float]:
        """`n` texts int ``[n, LENGTH]`` after the token `last`, and the mean number of drafted tokens that were taken
        at a time (0 where nothing is drafted)."""
        raise NotImplementedError

    def test_texts_come_as_often_as_the_model_says(self) -> None:
        texts, _ = self.draw(self.target, self.drafter, 3, self.N, 0)
        assert texts.shape == (self.N, LENGTH) and texts.min() >= 0 and texts.max() < V
        got, want = np.zeros((V,) * LENGTH), self.target.texts(3)
        np.add.at(got, tuple(texts.T), 1 / self.N)
        deviation = np.sqrt(want * (1 - want) / self.N)
        wrong = np.argwhere(np.abs(got - want) > SIGMAS * deviation + 1 / self.N)
        assert (len(wrong) == 0) == self.exact, wrong[:5]
        # The whole distribution: a mean over texts has far less noise than each.
        for t in range(LENGTH):
            others = tuple(i for i in range(LENGTH) if i != t)
            a, b = got.sum(others), want.sum(others)
            near = bool((np.abs(a - b) <= SIGMAS * np.sqrt(b * (1 - b) / self.N) + 1e-12).all())
            assert near or not self.exact, (t, a, b)

    def test_as_many_drafts_are_taken_as_the_models_agree(self) -> None:
        if not self.drafts:
            return
        _, taken = self.draw(self.target, self.drafter, 3, self.N, 1)
        want = expected_accepted(self.target, self.drafter, 3, self.drafts)
        assert abs(taken - want) <= SIGMAS * self.drafts / np.sqrt(self.N)

    def test_a_drafter_that_is_the_target_is_always_right(self) -> None:
        if not self.drafts:
            return
        _, taken = self.draw(self.target, self.target, 3, 1000, 2)
        assert taken == self.drafts
