"""Keys from two places are keys from one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.attention import BACKENDS, D, draw, reference, side

from lm.attention.attend import attend
from lm.attention.branches import Branch, Context, Keys, Tokens
from lm.attention.masks import Causal, Window
from lm.positions.rope import Rope

T, S, CUT = 12, 31, 19


def _part(x: Tokens, at: slice) -> Tokens:
    return Tokens(x.index_BT[:, at], x.positions_BT[:, at])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_in_two_sources(backend: str, rotated: bool) -> None:
    """A memory and the keys of the text, each with its own branch, are one softmax; so are masks that differ."""
    q, k, v = draw(np.random.default_rng(0), T, S)
    tokens, positions, length = side(S), Rope(trained=64), jnp.asarray(float(S))
    queries = _part(tokens, slice(S - T, S))
    kept = positions.rotate(k, tokens.positions_BT[:, :, None], length) if rotated else k

    def context(*cuts: slice) -> Context:
        sources = tuple(Keys(kept[:, c], v[:, c], _part(tokens, c), rotated) for c in cuts)
        return Context(q, queries, sources, positions, length, D**-0.5)

    far, near = slice(0, CUT), slice(CUT, S)
    mask = Causal()

    @jax.jit
    def run() -> tuple[jax.Array, ...]:
        one, two = context(slice(0, S)), context(far, near)
        swapped = context(near, far)
        branches = (Branch(mask), Branch(mask, source=1))
        whole = attend(one, (Branch(mask),), backend=backend, block_q=8, block_k=8)
        split = attend(two, branches, backend=backend, block_q=8, block_k=8)
        other = attend(swapped, branches, backend=backend, block_q=8, block_k=8)
        window = attend(two, (Branch(mask & Window(4), source=1),), backend=backend, block_q=8, block_k=8)
        return (*whole, *split, *other, window[0])

    y, lse, y2, lse2, y3, lse3, yw = run()
    for got in ((y2, lse2), (y3, lse3)):
        np.testing.assert_allclose(got[0], y, rtol=0, atol=2e-6)
        np.testing.assert_allclose(got[1], lse, rtol=0, atol=2e-6)
    at = np.arange(S)
    seen = (at[None, :] <= at[S - T :, None])[None]
    turned = [
        np.asarray(positions.rotate(x, p[:, :, None], length))
        for x, p in ((q, queries.positions_BT), (k, tokens.positions_BT))
    ]
    np.testing.assert_allclose(y, reference(*turned, v, seen)[0], rtol=0, atol=2e-6)
    far_off = (at[S - T :, None] - at[None, :] < 4) & (at[None, :] >= CUT)
    np.testing.assert_allclose(yw, reference(*turned, v, seen & far_off)[0], rtol=0, atol=2e-6)
