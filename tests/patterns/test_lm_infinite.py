"""LM-Infinite's far tokens and its ceiling, against NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases.attention import BACKENDS, D, H, K, draw

from lm.attention.attend import attend
from lm.attention.branches import Context, Keys, Tokens
from lm.patterns import TABLE
from lm.positions.alibi import Alibi, slopes
from lm.positions.rope import Rope


@pytest.mark.parametrize("distance", [None, 3.0])
@pytest.mark.parametrize("positions", [Alibi(), Rope(trained=64)], ids=["alibi", "rope"])
def test_inserted_tokens_take_their_constant_distance(positions: Any, distance: float | None) -> None:
    """The far tokens of LM-Infinite, several rows of different documents, with a soft-cap too high to matter."""
    T, L, G, top_k = 30, 10, 2, 3
    rng = np.random.default_rng(5)
    q, k, v = draw(rng, T, T)
    at = L / 2 if distance is None else distance
    alibi = isinstance(positions, Alibi)

    def pairs(t: int, h: int) -> list[tuple[int, float]]:
        near = [(j, float(min(t - j, L))) for j in range(t + 1) if t - j < L or j < G]
        middle = list(range(G, t - L + 1))
        if len(middle) < top_k:
            return near
        turned = np.float64(q[0, t, h]) if alibi else oracles.rotate(np.float64(q[0, t, h]), at, 10000.0)
        best = sorted(middle, key=lambda j: -float(turned @ np.float64(k[0, j, h // (H // K)])))[:top_k]
        return near + [(j, at) for j in best]

    pattern = TABLE["lm_infinite"](
        window=L,
        sinks=G,
        ceiling=float(L),
        top_k=top_k,
        top_k_from_layer=0,
        top_k_queries=None,
        top_k_distance=distance,
    )
    index = jnp.arange(T, dtype=jnp.int32)[None]
    side = Tokens(index, index.astype(jnp.float32), contiguous=True)

    @functools.partial(jax.jit, static_argnums=3)
    def run(q: Any, k: Any, v: Any, backend: str) -> Any:
        ctx = Context(q, side, (Keys(k, v, side),), positions, jnp.asarray(float(T)), D**-0.5)
        return attend(ctx, pattern.branches(ctx), softcap=1e4, backend=backend, block_q=8, block_k=8)[0]

    want = oracles.attention(q[0], k[0], v[0], pairs, slopes=slopes(H) if alibi else None)
    for backend in BACKENDS:
        out = run(q, k, v, backend)
        np.testing.assert_allclose(out[0], want, rtol=0, atol=2e-5)


def test_a_ceiling_need_not_be_a_whole_number() -> None:
    q, k, v = draw(np.random.default_rng(2), 24, 24)
    pattern = TABLE["lm_infinite"](window=9, sinks=2, ceiling=4.5)
    side = Tokens(jnp.arange(24, dtype=jnp.int32)[None], jnp.arange(24.0)[None], contiguous=True)
    ctx = Context(q, side, (Keys(k, v, side),), Rope(trained=64), jnp.asarray(24.0), D**-0.5)
    want = oracles.attention(
        q[0], k[0], v[0], lambda t, h: [(j, min(t - j, 4.5)) for j in range(t + 1) if t - j < 9 or j < 2]
    )
    both = jax.jit(lambda: [attend(ctx, pattern.branches(ctx), backend=b, block_q=8, block_k=8) for b in BACKENDS])
    for out, _ in both():
        np.testing.assert_allclose(out[0], want, rtol=0, atol=2e-6)
