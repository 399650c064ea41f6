"""The suites themselves: they accept what is right and notice what is not."""

from __future__ import annotations

import numpy as np
import pytest

from cases import model, rows
from cases.drafter_case import DrafterCase
from cases.model import BASE, TOKENS
from cases.plug_case import PlugCase, _beyond, _by
from cases.table_model import LENGTH, TableModel, V


class _Speculative(DrafterCase):
    """Drafting and exact acceptance in NumPy (arXiv 2211.17192, algorithm 1), three tokens at a time."""

    drafts = 3

    def residual(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        rest = np.maximum(p - q, 0.0)
        total = rest.sum(-1, keepdims=True)
        return np.asarray(np.where(total > 0, rest / np.where(total > 0, total, 1.0), p))

    def draw(self, target: TableModel, drafter: TableModel, last: int, n: int, seed: int) -> tuple[np.ndarray, float]:
        rng = np.random.default_rng(seed)

        def pick(p_BV: np.ndarray) -> np.ndarray:
            return np.minimum((rng.random((n, 1)) > p_BV.cumsum(-1)).sum(-1), V - 1)

        texts, made = np.zeros((n, LENGTH + self.drafts + 1), int), np.zeros(n, int)
        at, taken = np.full(n, last), []
        while (made < LENGTH).any():
            alive, count, now = np.ones(n, bool), np.zeros(n, int), at.copy()
            for _ in range(self.drafts):
                p, q = target.p_VV[now], drafter.p_VV[now]
                token = pick(q)
                good = alive & (rng.random(n) < np.take_along_axis(p / q, token[:, None], 1)[:, 0])
                failed = alive & ~good
                new = np.where(good, token, pick(self.residual(p, q)))
                self._put(texts, made, good | failed, new)
                now = np.where(good | failed, new, now)
                alive, count = good, count + good
            new = pick(target.p_VV[now])
            self._put(texts, made, alive, new)
            at = np.where(alive, new, now)
            taken.append(count)
        return texts[:, :LENGTH], float(taken[0].mean())

    @staticmethod
    def _put(texts: np.ndarray, made: np.ndarray, where: np.ndarray, token: np.ndarray) -> None:
        where = where & (made < texts.shape[1])
        texts[where, made[where]] = token[where]
        made += where


class TestExactAcceptance(_Speculative):
    pass


class TestARejectedTokenDrawnAnewFromTheTargetIsNoticed(_Speculative):
    exact = False

    def residual(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return p


def test_texts_of_a_table_are_a_distribution() -> None:
    table = TableModel.random(4)
    assert table.texts(2).sum() == pytest.approx(1.0)
    assert np.unravel_index(table.texts(2, 1).argmax(), (V,)) == (table.likeliest(2)[0],)
    np.testing.assert_allclose(table.texts(2, 2).sum(1), table.p_VV[2])


def test_rows_alone_are_the_rows_together_where_none_interacts() -> None:
    """The same program, eight times."""
    for batch in (rows.texts(), rows.short()):
        together, apart = (_by(BASE, model.parameters(BASE), batch, "dense", one) for one in (False, True))
        valid = batch.index_BT >= 0
        np.testing.assert_allclose(apart[valid], together[valid], rtol=0, atol=1e-5)


def test_what_rows_are_compared_with_differs() -> None:
    """No two texts of the rows begin alike, so that a mistaken row shows."""
    begins = {tuple(row[:6]) for row in rows.texts().tokens_BT[[0, 1, 5, 7]]}
    assert len(begins) == 4 and TOKENS.shape[1] == rows.SHORT + 5


def test_a_limit_that_is_the_baseline_costs_nothing() -> None:
    class Case(PlugCase):
        change = {"pattern": {"name": "causal"}}
        limits = ({"pattern": {"name": "causal", "prefix": 0}}, {"pattern": {"name": "sliding_window", "window": 44}})

    assert Case.allowed() == PlugCase.PROGRAMS + 2


def test_what_differs_is_named() -> None:
    one = {"a": {"kernel": np.ones(4)}, "b": np.zeros(3)}
    other = {"a": {"kernel": np.ones(4) + 1e-4}, "b": np.zeros(3)}
    assert _beyond(np.ones(2), np.ones(2), one, one, 1e-5, 1e-5) == []
    assert _beyond(np.ones(2), np.ones(2) + 1e-3, one, other, 1e-5, 1e-5) == ["logits", "a/kernel"]
    assert _beyond(np.full(2, np.nan), np.ones(2), one, {**one, "b": np.ones(3)}, 1e-5, 1e-5) == ["logits", "b"]
