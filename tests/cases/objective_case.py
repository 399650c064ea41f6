"""The tests every objective owes, as one class of one program: loss and gradient in closed form on five tokens.

The model's layers write nothing into the stream, so its final states are normalised rows of the embedding table, and
NumPy knows the logits. Split batches and rows without weight are further runs of the same program.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import numpy as np

from cases import model
from cases.budget import Budget, once
from cases.model import BASE, Params
from lm.config import ModelConfig

V, B, N, D = 5, 4, 6, 8
EPS = 1e-5


class ObjectiveCase(Budget):
    """`objective`: the plug. `loss`: its sum over the batch and its sums by name, in float64, from log-probabilities.

    `sums` names those of `loss`; others that the objective reports are not looked at.
    """

    objective: ClassVar[Any]
    PROGRAMS: ClassVar[int] = 1

    def loss(self, logits_BTV: np.ndarray, batch: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        raise NotImplementedError

    @property
    def cfg(self) -> ModelConfig:
        sizes = {"vocab_size": V, "d_model": D, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 8}
        return model.changed(BASE, {**sizes, "head": {"name": "linear", "tie": False}})

    @once
    def params(self) -> Params:
        """Random, but for the two matrices by which a layer writes: zeros."""
        rng = np.random.default_rng(0)
        tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), model.abstract(self.cfg))
        for part, name in (("attn", "o"), ("ffn", "down")):
            tree["blocks"][part][name]["kernel"] *= 0
        return tree

    def hidden(self, tokens_BT: np.ndarray) -> np.ndarray:
        x = np.float64(self.params["embed"])[tokens_BT]
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * self.params["final_norm"]["scale"])

    def batch(self, seed: int = 1) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, V, (B, N + 1)).astype(np.int32)
        weights = rng.choice([0.0, 0.5, 1.0], (B, N)).astype(np.float32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    @once
    def program(self) -> Any:
        return model.loss_and_gradient(self.cfg, self.objective)

    def run(self, batch: dict[str, np.ndarray]) -> tuple[float, dict[str, float], np.ndarray]:
        """The loss, the sums, and the gradient of the head's matrix ``[D, V]``."""
        (loss, sums), grads = self.program(self.params, batch)
        return float(loss), {k: float(v) for k, v in sums.items()}, np.float64(grads["head"]["kernel"])

    def logits(self, kernel_DV: np.ndarray, batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self.hidden(batch["inputs"]) @ kernel_DV)

    def test_loss_and_sums_are_the_definition(self) -> None:
        batch = self.batch()
        loss, sums, _ = self.run(batch)
        want, want_sums = self.loss(self.logits(np.float64(self.params["head"]["kernel"]), batch), batch)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        for name, value in want_sums.items():
            np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)

    def test_gradient_is_the_definitions(self) -> None:
        batch, kernel, step = self.batch(), np.float64(self.params["head"]["kernel"]), 1e-6
        _, _, grad = self.run(batch)
        for at in np.ndindex(kernel.shape):
            ends = []
            for sign in (1, -1):
                moved = kernel.copy()
                moved[at] += sign * step
                ends.append(self.loss(self.logits(moved, batch), batch)[0])
            assert abs(grad[at] - (ends[0] - ends[1]) / (2 * step)) <= 1e-5 * np.abs(grad).max()

    def test_sums_add_over_a_split_batch(self) -> None:
        batch = self.batch()
        loss, sums, grad = self.run(batch)
        halves = []
        for kept in (slice(0, B // 2), slice(B // 2, B)):
            weights = np.zeros_like(batch["weights"])
            weights[kept] = batch["weights"][kept]
            halves.append(self.run({**batch, "weights": weights}))
        np.testing.assert_allclose(halves[0][0] + halves[1][0], loss, rtol=1e-5)
        for name, value in sums.items():
            np.testing.assert_allclose(halves[0][1][name] + halves[1][1][name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(halves[0][2] + halves[1][2], grad, rtol=0, atol=1e-5 * np.abs(grad).max())

    def test_rows_without_weight_are_nobody(self) -> None:
        """Other tokens there change no bit."""
        batch = self.batch()
        batch["weights"][1] = 0
        other = {k: v.copy() for k, v in batch.items()}
        for name in ("inputs", "targets"):
            other[name][1] = (other[name][1] + 2) % V
        one, two = self.run(batch), self.run(other)
        assert one[:2] == two[:2]
        np.testing.assert_array_equal(one[2], two[2])
