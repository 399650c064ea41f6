"""The tests every mixer owes, as one class of four programs: a layer by itself against NumPy.

1. Rows with index and segments: the naive form, packing and padding are reads of what one program gives.
2. Pieces and single tokens from state to state. 3. The same text cut elsewhere: outputs and the last state are equal.
4. The gradient, against differences of the naive form.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cases import model
from cases.budget import Budget, once
from cases.model import BASE, Params, rms_ratio
from lm.config import ModelConfig

N, CUT = 22, 9  # tokens of a row; where its two documents meet
SPLITS = ((7, -3, 5, -(N - 15)), (1, 16, -(N - 17)))


class MixerCase(Budget):
    """`change`: the mixer, merged over the baseline. `naive` is the layer in float64, written from its equations."""

    change: ClassVar[dict[str, Any]]
    PROGRAMS: ClassVar[int] = 4

    def naive(self, params: Params, x_TD: np.ndarray) -> np.ndarray:
        """Output ``[T, D]`` of one document in float64; loops are welcome."""
        raise NotImplementedError

    @property
    def cfg(self) -> ModelConfig:
        return model.changed(BASE, self.change)

    @once
    def params(self) -> Params:
        rng = np.random.default_rng(2)
        return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), model.mixer_shapes(self.cfg))

    @property
    def x_BTD(self) -> np.ndarray:
        return np.random.default_rng(3).normal(size=(4, N, BASE.d_model)).astype(np.float32)

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(x, index, segments)``: a whole row; two documents; the first of them alone; a row padded on its left."""
        x = self.x_BTD.copy()
        index = np.stack([np.arange(N), np.r_[:CUT, : N - CUT], np.arange(N), np.arange(N) - 4]).astype(np.int32)
        segments = np.ones((4, N), np.int32)
        segments[1, CUT:] = 2
        x[2, :CUT] = x[1, :CUT]
        index[2, CUT:] = -1
        return x, np.maximum(index, -1), segments

    @once
    def whole(self) -> np.ndarray:
        x, index, segments = self.rows()
        run = jax.jit(lambda p, x, i, s: model.mixer(self.cfg, p, x, i, segments_BT=s)[0])
        return np.asarray(run(self.params, x, index, segments))

    def through(self, pieces: tuple[int, ...]) -> tuple[np.ndarray, Any]:
        """Output and last state of two rows, read by pieces (``-n``: n tokens one by one, in one loop)."""
        x = self.x_BTD[:2]
        index = np.broadcast_to(np.arange(N, dtype=np.int32), (2, N))

        def run(params: Params, x: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
            state, at, got = model.mixer_state(self.cfg, 2, N), 0, []

            def step(state: Any, row: Any) -> tuple[Any, jax.Array]:
                y, state = model.mixer(self.cfg, params, *row, cache=state)
                return state, y

            for n in pieces:
                new = x[:, at : at + abs(n)], index[:, at : at + abs(n)]
                if n > 0:
                    state, y = step(state, new)
                else:
                    state, many = jax.lax.scan(step, state, tuple(a.swapaxes(0, 1)[:, :, None] for a in new))
                    y = many[:, :, 0].swapaxes(0, 1)
                got.append(y)
                at += abs(n)
            return jnp.concatenate(got, axis=1), state

        return jax.tree.map(np.asarray, jax.jit(run)(self.params, x, index))

    def test_it_is_the_naive_form(self) -> None:
        x, index, _ = self.rows()
        for row, part in ((0, slice(None)), (1, slice(0, CUT)), (1, slice(CUT, N)), (3, slice(4, N))):
            assert index[row, part][0] == 0
            assert rms_ratio(self.whole[row, part], self.naive(self.params, np.float64(x[row, part]))) <= 1e-5

    def test_a_document_alone_is_the_same(self) -> None:
        assert rms_ratio(self.whole[2, :CUT], self.whole[1, :CUT]) <= 1e-5

    def test_every_split_gives_the_same_and_ends_in_the_same_state(self) -> None:
        want = np.stack([self.naive(self.params, np.float64(x)) for x in self.x_BTD[:2]])
        (one, state), (other, other_state) = (self.through(pieces) for pieces in SPLITS)
        assert rms_ratio(one, want) <= 1e-5 and rms_ratio(other, want) <= 1e-5
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))

    def test_gradient(self) -> None:
        """Along random directions, of a loss that weighs every output differently."""
        x = self.x_BTD[:1]
        index = np.arange(N, dtype=np.int32)[None]
        run = jax.jit(jax.grad(lambda p, x: jnp.sin(3 * model.mixer(self.cfg, p, x, index)[0]).sum(), (0, 1)))
        grads = jax.tree.leaves(jax.tree.map(np.float64, run(self.params, x)))
        leaves, tree = jax.tree.flatten((self.params, x))
        rng, step = np.random.default_rng(4), 1e-5
        for _ in range(3):
            way = [rng.normal(size=leaf.shape) for leaf in leaves]
            ends = []
            for sign in (1, -1):
                moved = [np.float64(leaf) + sign * step * d for leaf, d in zip(leaves, way, strict=True)]
                params, at = jax.tree.unflatten(tree, moved)
                ends.append(np.sin(3 * self.naive(params, at[0])).sum())
            want = (ends[0] - ends[1]) / (2 * step)
            got = sum(float((g * d).sum()) for g, d in zip(grads, way, strict=True))
            assert abs(got - want) <= 1e-4 * float(np.sqrt(sum((g**2).sum() for g in grads)))
