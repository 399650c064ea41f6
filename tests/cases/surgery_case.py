"""The tests every surgery owes, as one class of one program: a one-layer model before, after, and at its limits.

The same program gives the logits of every tree: of the model as it was, of what the surgery makes of it, of that with
its weights written out, and of the limits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import numpy as np
from programs import uncovered

from cases import model
from cases.budget import Budget, once
from cases.model import BASE, TOKENS, Params
from lm.config import ModelConfig


class SurgeryCase(Budget):
    """`change`: of the one-layer baseline. A subclass gives `made` and may give `limits` and `oracle`."""

    change: ClassVar[dict[str, Any]] = {}
    changes_output: ClassVar[bool] = True
    PROGRAMS: ClassVar[int] = 1

    @property
    def cfg(self) -> ModelConfig:
        return model.changed(BASE, {"n_layers": 1, **self.change})

    @once
    def params(self) -> Params:
        return model.parameters(self.cfg)

    def made(self, cfg: ModelConfig, params: Params) -> Params:
        """The parameters after the surgery."""
        raise NotImplementedError

    def limits(self, cfg: ModelConfig, params: Params) -> dict[str, Params]:
        """Trees of settings at which nothing changes, bit for bit, by what they are called."""
        return {}

    def oracle(self, name: str, weight: np.ndarray) -> np.ndarray | None:
        """What becomes of a parameter, in float64 and by other code; None = it stays."""
        raise NotImplementedError

    @once
    def after(self) -> Params:
        with uncovered():
            return self.made(self.cfg, self.params)

    @once
    def logits(self) -> dict[str, np.ndarray]:
        with uncovered():
            trees = {"before": self.params, "after": self.after, "written out": model.densified(self.after)}
            trees |= self.limits(self.cfg, self.params)
        return dict(zip(trees, model.many_logits(self.cfg, TOKENS, *trees.values()), strict=True))

    def test_every_weight_is_the_oracles(self) -> None:
        with uncovered():
            before, after = model.named(self.params), model.named(self.after)
            assert set(before) == set(after)
            changed = 0
            for name, leaf in before.items():
                want = self.oracle(name, np.float64(leaf))
                if want is None:
                    np.testing.assert_array_equal(model.dense(after[name]), leaf, err_msg=name)
                    continue
                changed += 1
                scale = float(np.abs(want).max())
                np.testing.assert_allclose(model.dense(after[name]), want, rtol=0, atol=1e-6 * scale, err_msg=name)
        assert changed

    def test_it_computes_with_the_weights_it_stands_for(self) -> None:
        got, want = self.logits["after"], self.logits["written out"]
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))
        assert bool(np.abs(got - self.logits["before"]).max() > 1e-4) == self.changes_output

    def test_limits_change_nothing(self) -> None:
        for name in set(self.logits) - {"before", "after", "written out"}:
            np.testing.assert_array_equal(self.logits[name], self.logits["before"], err_msg=name)

    def test_what_was_given_is_as_it_was(self) -> None:
        before = jax.tree.map(lambda x: np.array(x), self.params)
        with uncovered():
            self.made(self.cfg, self.params)
        jax.tree.map(np.testing.assert_array_equal, before, self.params)
