"""The tests every model plug owes, as one class of seven programs: a plug's test file subclasses `PlugCase` in a few
lines.

1, 2. Forward by dense and by blocked, on rows of one shape: packing, padding, row order, a shorter text and causality
   are reads of what one program gives.
3, 4. The gradient by dense over layers in a loop, and by blocked over unrolled layers that are computed twice.
5. Bfloat16 by dense and by blocked.
6. A piece, single tokens, another piece and single tokens through the cache.
7. Eight devices.

Every limit adds a program, and one of them the baseline's.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from cases import model, rows
from cases.budget import Budget
from cases.model import BASE, TOKENS, Params, T, rms_ratio
from lm.config import ModelConfig

BACKENDS = ("dense", "blocked")
PIECES = (13, -2, 13, -(T - 28))
UNROLLED = {"scan_layers": False, "remat": True}


class PlugCase(Budget):
    """`change`: the plug, merged over the baseline; `limits`: settings at which it must be the baseline.

    `causal`: no token sees a later one. `training_free`: it runs on the baseline's parameters. `cached`: decoding with
    a cache gives the whole text's logits. `rows_interact`: what a row gives depends on the others (experts with a
    capacity), so rows are read one at a time, among padding.
    """

    change: ClassVar[dict[str, Any]]
    limits: ClassVar[tuple[dict[str, Any], ...]] = ()
    causal: ClassVar[bool] = True
    training_free: ClassVar[bool] = True
    cached: ClassVar[bool] = True
    rows_interact: ClassVar[bool] = False
    PROGRAMS: ClassVar[int] = 7

    @property
    def cfg(self) -> ModelConfig:
        return model.changed(BASE, self.change)

    @property
    def params(self) -> Params:
        return model.parameters(BASE) if self.training_free else model.parameters(self.cfg)

    @classmethod
    def allowed(cls) -> int:
        others = [cfg for cfg in (model.changed(BASE, limit) for limit in cls.limits) if cfg != BASE]
        return cls.PROGRAMS + len(others) + bool(cls.limits)

    def read(self, batch: rows.Rows, name: str) -> np.ndarray:
        """Logits ``[8, T, V]`` of `batch` by the backend `name`."""
        return _read(type(self), batch, name)

    def test_same_tree(self) -> None:
        assert (model.shapes(self.cfg) == model.shapes(BASE)) == self.training_free

    @pytest.mark.parametrize("name", BACKENDS)
    def test_packed_documents_are_separate(self, name: str) -> None:
        """Two documents in a row give what each gives alone (padded on its right)."""
        got = self.read(rows.texts(), name)
        for packed, part, alone in rows.DOCUMENTS:
            assert rms_ratio(got[packed, part], got[alone, : part.stop - part.start]) <= 1e-5

    @pytest.mark.parametrize("name", BACKENDS)
    def test_a_place_in_the_batch_changes_nothing(self, name: str) -> None:
        got, want = self.read(rows.others(), name), self.read(rows.texts(), name)
        for here, there in rows.MOVED:
            valid = rows.texts().index_BT[there] >= 0
            np.testing.assert_allclose(got[here, valid], want[there, valid], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", BACKENDS)
    def test_padding_changes_nothing(self, name: str) -> None:
        """Tokens left or right of a text. Where no token sees a later one, a text is the beginning of a longer one."""
        got, n = self.read(rows.short(), name), rows.SHORT
        for row in range(2):
            left, right = got[row, T - n :], got[row + 2, :n]
            assert rms_ratio(left, right) <= 1e-5
            if self.causal and not model.length_dependent(self.cfg):
                longer = self.read(rows.texts(), name)[row, :n]
                assert rms_ratio(left, longer) <= 1e-5 and rms_ratio(right, longer) <= 1e-5

    @pytest.mark.parametrize("name", BACKENDS)
    def test_no_token_sees_a_later_one(self, name: str) -> None:
        """Other last tokens change nothing before them: by dense, not one bit."""
        got, early = self.read(rows.others(), name), T - rows.LATE
        for other, same in rows.CHANGED:
            assert rms_ratio(got[other, early:], got[same, early:]) > 1e-3
            if name == "dense":
                assert bool((got[other, :early] == got[same, :early]).all()) == self.causal
            assert (rms_ratio(got[other, :early], got[same, :early]) <= 1e-5) == self.causal

    def test_blocked_equals_dense(self) -> None:
        for batch in (rows.texts(), rows.others(), rows.short()):
            dense, blocked = (self.read(batch, name) for name in BACKENDS)
            assert rms_ratio(blocked[batch.index_BT >= 0], dense[batch.index_BT >= 0]) <= 1e-5

    def test_blocked_unrolled_and_remat_equal_dense(self) -> None:
        """Gradients of both, and their logits, of rows without index or segments, against those with."""
        other = model.changed(model.backend(self.cfg, "blocked"), UNROLLED)
        (_, want_logits), want_grads = model.gradient(self.cfg)(self.params)
        (_, got_logits), got_grads = model.gradient(other)(self.params)
        wrong = _beyond(got_logits, want_logits, got_grads, want_grads, 1e-5, 2e-5)
        assert not wrong, f"{wrong}; of these alone: {self._factors()}"
        if not self.rows_interact:
            for name, plain in zip(BACKENDS, (want_logits, got_logits), strict=True):
                assert rms_ratio(self.read(rows.texts(), name)[:2], plain) <= 1e-5

    def _factors(self) -> dict[str, list[str]]:
        """What each of the changes does by itself; compiled when they fail together."""
        (_, want), g_want = model.gradient(self.cfg)(self.params)
        alone = {
            "blocked": {"mixer": {"backend": "blocked"}},
            "unrolled": {"scan_layers": False},
            "remat": {"remat": True},
        }
        found = {}
        for name, change in alone.items():
            (_, got), g_got = model.gradient(model.changed(self.cfg, change))(self.params)
            found[name] = _beyond(got, want, g_got, g_want, 1e-5, 2e-5)
        return found

    def test_bfloat16_is_no_worse_than_dense(self) -> None:
        """Against float32 on the same bf16-rounded parameters, blocked errs at most twice as much as dense does."""
        rounded = model.cast(self.params, "bfloat16")
        want = _by(self.cfg, rounded, rows.texts(), "dense", self.rows_interact)[:2]
        halves = model.both_backends(model.changed(self.cfg, {"dtype": "bfloat16"}))(rounded, TOKENS)
        dense, blocked = (rms_ratio(half, want) for half in halves)
        assert 0 < dense < 0.1
        assert blocked <= 2 * dense

    def test_full_equals_prefill_and_decode(self) -> None:
        """Chunks and single tokens through the cache; a plug that declares no cached form must indeed differ."""
        got = model.decoded(self.cfg, PIECES)(self.params, TOKENS)
        assert (rms_ratio(got, self.read(rows.texts(), "dense")[:2]) <= 1e-5) == self.cached

    def test_one_device_equals_eight(self) -> None:
        if jax.device_count() < 8:
            pytest.fail("the suite starts with eight CPU devices; see tests/conftest.py")
        batch = rows.others()
        whole = np.flatnonzero((batch.index_BT >= 0).all(axis=1))  # rows that need neither index nor segments
        tokens = np.concatenate([batch.tokens_BT[whole]] * (rows.ROWS // len(whole)))
        got, devices = model.on_mesh(model.backend(self.cfg, "blocked"), self.params, tokens)
        assert devices == rows.ROWS
        assert rms_ratio(got[: len(whole)], self.read(batch, "blocked")[whole]) <= 1e-5

    def test_limits_are_the_baseline(self) -> None:
        params = model.parameters(BASE)
        want = model.logits(BASE, params, tokens_BT=TOKENS) if self.limits else None
        for limit in self.limits:
            got = model.logits(model.changed(BASE, limit), params, tokens_BT=TOKENS)
            np.testing.assert_array_equal(got, want, err_msg=str(limit))


class KindCase(PlugCase):
    """`PlugCase`, and what is asked of one plug of a kind: it leaves the baseline's program alone, causality holds by
    gradient, and layers in a loop, unrolled and computed twice give the same to rounding."""

    PROGRAMS: ClassVar[int] = PlugCase.PROGRAMS + 2

    def test_off_is_off(self) -> None:
        """Building and tracing the plug leaves the baseline's program as it was."""
        before = model.program(BASE)
        assert model.program(self.cfg) != before
        assert model.program(BASE) == before

    def test_causality_by_gradient(self) -> None:
        t = T - 9
        seen = model.influence(self.cfg, self.params, t)
        assert seen[t] > 0
        assert bool(np.all(seen[t + 1 :] == 0)) == self.causal

    def test_scan_and_remat_change_nothing(self) -> None:
        (_, want), g_want = model.gradient(self.cfg)(self.params)
        (_, got), g_got = model.gradient(model.changed(self.cfg, UNROLLED))(self.params)
        assert _beyond(got, want, g_got, g_want, 1e-6, 1e-5) == []


class EagerCase(KindCase):
    """`KindCase` and the same without jit, which takes seconds."""

    def test_jit_changes_nothing(self) -> None:
        want = self.read(rows.texts(), "dense")[:1]
        assert rms_ratio(model.without_jit(self.cfg, self.params, TOKENS[:1]), want) <= 1e-5


@functools.lru_cache(maxsize=64)
def _read(case: type[PlugCase], batch: rows.Rows, name: str) -> np.ndarray:
    return _by(case().cfg, case().params, batch, name, case.rows_interact)


def _by(cfg: ModelConfig, params: Params, batch: rows.Rows, name: str, one_at_a_time: bool) -> np.ndarray:
    """Logits ``[8, T, V]`` by the backend `name`, all rows at once, or each among padding."""
    cfg = model.backend(cfg, name)
    if not one_at_a_time:
        return model.read(cfg, params, batch.tokens_BT, batch.index_BT, batch.segments_BT)
    made = [batch.alone(r) for r in range(rows.ROWS)]
    return np.stack([model.read(cfg, params, b.tokens_BT, b.index_BT, b.segments_BT)[r] for r, b in enumerate(made)])


def _beyond(got: Any, want: Any, g_got: Params, g_want: Params, close: float, g_close: float) -> list[str]:
    """What differs by more than rounding: the logits, and gradients by name."""
    errors = {"logits": rms_ratio(got, want) / close}
    a, b = model.gradients_by_name(g_got), model.gradients_by_name(g_want)
    assert set(a) == set(b)
    errors |= {name: rms_ratio(a[name], b[name]) / g_close for name in a}
    return [name for name, error in errors.items() if not error <= 1]
