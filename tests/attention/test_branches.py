"""Branches, segments and padding: random masks against NumPy, disjoint parts and their merge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.attention import BACKENDS, D, draw, reference

from lm.attention.attend import attend
from lm.attention.branches import NEG, Branch, Context, Keys, Tokens, merge
from lm.attention.masks import And, Causal, Chunked, Full, Mask, Not, Or, Prefix, Sinks, Window
from lm.positions.nope import NoPE


def random_mask(rng: np.random.Generator, depth: int = 2) -> Mask:
    if depth == 0 or rng.random() < 0.2:
        n = int(rng.integers(1, 14))
        return [Causal(), Full(), Window(n), Sinks(n), Prefix(n), Chunked(n)][int(rng.integers(6))]
    a, b = random_mask(rng, depth - 1), random_mask(rng, depth - 1)
    return [And(a, b), Or(a, b), Not(a), And(Causal(), a)][int(rng.integers(4))]


def random_row(rng: np.random.Generator, T: int, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """In-document indices and document ids of one row."""
    if kind == "plain":
        return np.arange(T), None
    if kind == "padded":  # on the left, then on the right
        index = np.arange(T) - int(rng.integers(0, T // 2))
        index[T - int(rng.integers(0, T // 3)) :] = -1
        return index, None
    cuts = np.sort(rng.choice(np.arange(1, T), 2, replace=False))
    segments = np.searchsorted(cuts, np.arange(T), side="right")
    return np.arange(T) - np.r_[0, cuts][segments], segments


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("seed", range(4))
def test_random_masks_on_random_rows(seed: int, kind: str) -> None:
    """A mask split in two disjoint branches, on both backends: output, log-sum-exp and gradients."""
    rng = np.random.default_rng([seed, ["plain", "padded", "packed"].index(kind)])
    T, B = int(rng.integers(9, 30)), 2
    bq, bk = (int(x) for x in rng.integers(3, 9, 2))
    mask, cut = random_mask(rng), random_mask(rng, 1)
    rows = [random_row(rng, T, kind) for _ in range(B)]
    index = np.stack([r[0] for r in rows])
    segments = None if rows[0][1] is None else np.stack([np.asarray(r[1]) for r in rows])
    side = Tokens(
        jnp.asarray(index, jnp.int32),
        jnp.asarray(index, jnp.float32),
        None if segments is None else jnp.asarray(segments, jnp.int32),
        contiguous=kind == "plain",
    )
    q, k, v = draw(rng, T, T, B)
    branches = (Branch(mask & cut), Branch(mask & ~cut))
    seen = np.asarray(mask(index[:, :, None], index[:, None]), bool) & (index >= 0)[:, :, None] & (index >= 0)[:, None]
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None]

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> Any:
        def loss(args: Any, backend: str) -> Any:
            q, k, v = args
            ctx = Context(q, side, (Keys(k, v, side),), NoPE(), jnp.asarray(float(T)), D**-0.5)
            out, lse = attend(ctx, branches, backend=backend, block_q=bq, block_k=bk)
            return jnp.sin(3 * out).sum() + jnp.where(lse > NEG / 2, jnp.cos(lse), 0.0).sum(), (out, lse)

        return [jax.value_and_grad(loss, has_aux=True)((q, k, v), backend) for backend in BACKENDS]

    want, want_lse = reference(q, k, v, seen)
    results = both(q, k, v)
    for (_, (out, lse)), _ in results:
        np.testing.assert_allclose(out, want, rtol=0, atol=3e-6, err_msg=str(mask))
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=3e-6, err_msg=str(mask))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert bool(jnp.isfinite(b).all())
        np.testing.assert_allclose(b, a, rtol=0, atol=5e-6 * max(1.0, float(jnp.abs(a).max())), err_msg=str(mask))


def test_rows_without_keys_take_nothing_from_their_branches() -> None:
    """Whatever an empty branch holds, and in either order, it has no share in output or gradient."""
    out = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])

    def merged(junk: Any, other: Any) -> Any:
        return merge([junk, other], [jnp.full(2, NEG), jnp.asarray([NEG, 0.5])])

    got, lse = merged(jnp.full((2, 2), 7.0), out)
    np.testing.assert_array_equal(got, [[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_array_equal(lse, np.float32([NEG, 0.5]))
    grads = jax.grad(lambda a, b: merged(a, b)[0].sum() + merged(a, b)[1][1], (0, 1))(jnp.full((2, 2), 7.0), out)
    np.testing.assert_array_equal(grads[0], jnp.zeros((2, 2)))
    np.testing.assert_array_equal(grads[1], [[0.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_branches_that_rest_on_rows_equal_the_masked_whole(rows: int) -> None:
    """`rows` cuts the queries of a branch; both backends agree with masking them by hand."""
    q, k, v = draw(np.random.default_rng(1), 21, 21)
    index = jnp.arange(21, dtype=jnp.int32)[None]
    side = Tokens(index, index.astype(jnp.float32), contiguous=True)
    near, far = Causal() & Window(4), Causal() & ~Window(4)
    at = np.arange(21)
    seen = np.asarray(near(at[:, None], at[None])) | np.asarray(far(at[:, None], at[None])) & (at >= 21 - rows)[:, None]
    want, want_lse = reference(q, k, v, seen[None])

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> Any:
        ctx = Context(q, side, (Keys(k, v, side),), NoPE(), jnp.asarray(21.0), D**-0.5)
        branches = (Branch(near), Branch(far, rows=rows))
        return [attend(ctx, branches, backend=b, block_q=8, block_k=5) for b in BACKENDS]

    for out, lse in both(q, k, v):
        np.testing.assert_allclose(out, want, rtol=0, atol=3e-6)
        np.testing.assert_allclose(lse, want_lse, rtol=0, atol=3e-6)
