"""Patterns against loops written from their papers, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lm.attention.attend import attend
from lm.attention.branches import NEG, Branch, Context, Keys, Tokens, merge
from lm.attention.masks import Causal, Not
from lm.patterns import TABLE
from lm.positions.alibi import Alibi, slopes
from lm.positions.rope import Rope

Pairs = Callable[[int, int], list[tuple[int, float]]]
H, K, D = 4, 2, 8
SHAPES = [
    (50, 50, 16, 4),
    (48, 48, 16, 4),
    (17, 17, 16, 4),
    (1, 50, 16, 4),
    (1, 16, 16, 4),
    (7, 27, 16, 4),
    (40, 60, 16, 4),
]


def _draw(T: int, S: int, seed: int = 0, heads: int = H, kv: int = K, d: int = D) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(1, n, h, d)).astype(np.float32) for n, h in ((T, heads), (S, kv), (S, kv)))  # type: ignore[return-value]


def _context(q: Any, k: Any, v: Any, positions: Any, shift: float = 0.0) -> Context:
    """The queries are the last T of S tokens."""
    T, S = q.shape[1], k.shape[1]
    sides = []
    for first, n in ((S - T, T), (0, S)):
        index = jnp.arange(first, first + n, dtype=jnp.int32)[None]
        sides.append(Tokens(index, index.astype(jnp.float32) + shift, contiguous=T == S))
    scale = q.shape[-1] ** -0.5
    keys = Keys(jnp.asarray(k), jnp.asarray(v), sides[1])
    return Context(jnp.asarray(q), sides[0], (keys,), positions, jnp.asarray(float(S)), scale)


def _run(pattern: Any, q: Any, k: Any, v: Any, positions: Any = None, shift: float = 0.0) -> list[np.ndarray]:
    """The pattern's output on both backends, ``[T, H, d]`` each."""
    positions = positions or Rope(trained=64)

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> list[Any]:
        ctx = _context(q, k, v, positions, shift)
        branches = pattern.branches(ctx)
        return [attend(ctx, branches, backend=b, block_q=8, block_k=16)[0][0] for b in ("dense", "blocked")]

    return [np.asarray(y, np.float64) for y in both(q, k, v)]


def _same(pattern: Any, T: int, S: int, pairs: Pairs, positions: Any = None, atol: float = 2e-6) -> None:
    q, k, v = _draw(T, S)
    m = slopes(H) if isinstance(positions, Alibi) else None
    want = oracles.attention(q[0], k[0], v[0], pairs, slopes=m)
    for got in _run(pattern, q, k, v, positions):
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def _lm_infinite(T: int, S: int, L: float, G: int, c: float) -> Pairs:
    """The card's rule: visible iff ``d < L`` or ``j < G``; distance ``min(d, c)``."""

    def pairs(t: int, h: int) -> list[tuple[int, float]]:
        at = S - T + t
        return [(j, min(at - j, c)) for j in range(at + 1) if at - j < L or j < G]

    return pairs


@pytest.mark.parametrize(("T", "S", "L", "G"), SHAPES)
def test_lm_infinite(T: int, S: int, L: int, G: int) -> None:
    pattern = TABLE["lm_infinite"](window=L, sinks=G, ceiling=float(L))
    _same(pattern, T, S, _lm_infinite(T, S, L, G, L))


@pytest.mark.parametrize(
    ("window", "sinks", "ceiling"),
    [
        (16, 0, None),
        (16, 4, None),
        (None, 0, 16.0),
        (16, 4, 16.0),
        (16, 4, 15.0),
        (16, 4, 9.0),
        (16, 4, 30.0),
        (None, 0, None),
    ],
    ids=["window", "lambda", "ceiling", "full", "ceiling-one-less", "ceiling-in-window", "ceiling-beyond", "vanilla"],
)
def test_lm_infinite_ablation_arms(window: int | None, sinks: int, ceiling: float | None) -> None:
    pattern = TABLE["lm_infinite"](window=window, sinks=sinks, ceiling=ceiling)
    inf = float("inf")
    _same(pattern, 50, 50, _lm_infinite(50, 50, window or inf, sinks, inf if ceiling is None else ceiling))


def test_lm_infinite_with_alibi_clips_the_bias() -> None:
    _same(TABLE["lm_infinite"](window=16, sinks=4, ceiling=16.0), 50, 50, _lm_infinite(50, 50, 16, 4, 16), Alibi())


def test_a_far_sink_sits_at_the_window_not_one_less() -> None:
    q, k, v = _draw(40, 40)
    at = [oracles.attention(q[0], k[0], v[0], _lm_infinite(40, 40, 16, 4, c)) for c in (16, 15)]
    got = _run(TABLE["lm_infinite"](window=16, sinks=4, ceiling=16.0), q, k, v)[0]
    assert np.abs(got - at[0]).max() < 1e-5 < 1e-3 < np.abs(got - at[1]).max()


@pytest.mark.parametrize("name", ["causal", "sliding_window", "streaming", "lm_infinite"])
def test_only_differences_of_positions_matter(name: str) -> None:
    pattern = TABLE[name]() if name == "causal" else TABLE[name](window=16)
    if name == "lm_infinite":
        pattern = TABLE[name](window=16, sinks=4, ceiling=16.0)
    q, k, v = _draw(50, 50)
    a, b = _run(pattern, q, k, v)[0], _run(pattern, q, k, v, shift=1000.0)[0]
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)  # float32 angles at position 1000


@pytest.mark.parametrize("queries", [1, 5, None])
@pytest.mark.parametrize("sharp", [False, True])
def test_lm_infinite_top_k(queries: int | None, sharp: bool) -> None:
    """Item 8 of the method, in loops: the k best middle keys at distance L/2, if the middle holds k of them."""
    T, L, G, top_k = 40, 12, 3, 4
    q, k, v = _draw(T, T, seed=3)
    if sharp:
        q = 3 * q

    def pairs(t: int, h: int) -> list[tuple[int, float]]:
        near = [(j, min(t - j, L)) for j in range(t + 1) if t - j < L or j < G]
        middle = [j for j in range(G, t - L + 1)]
        if len(middle) < top_k or (queries is not None and t < T - queries):
            return [(j, float(d)) for j, d in near]
        scored = {j: oracles.rotate(np.float64(q[0, t, h]), L / 2, 10000.0) @ k[0, j, h // (H // K)] for j in middle}
        best = sorted(middle, key=lambda j: -scored[j])[:top_k]
        return [(j, float(d)) for j, d in near] + [(j, L / 2) for j in best]

    pattern = TABLE["lm_infinite"](
        window=L, sinks=G, ceiling=float(L), top_k=top_k, top_k_from_layer=0, top_k_queries=queries
    )
    want = oracles.attention(q[0], k[0], v[0], pairs)
    for got in _run(pattern, q, k, v):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)


def test_top_k_starts_at_its_layer() -> None:
    pattern = TABLE["lm_infinite"](window=8, top_k=2, top_k_from_layer=4)
    assert [pattern.for_layer(i).top_k for i in range(6)] == [0, 0, 0, 0, 2, 2]


@pytest.mark.parametrize(("T", "S", "w"), [(50, 50, 16), (7, 27, 5), (1, 30, 9), (20, 20, 40)])
def test_sliding_window(T: int, S: int, w: int) -> None:
    def pairs(t: int, h: int) -> list[tuple[int, float]]:
        at = S - T + t
        return [(j, float(at - j)) for j in range(max(0, at - w + 1), at + 1)]

    _same(TABLE["sliding_window"](window=w), T, S, pairs)


@pytest.mark.parametrize(("w", "G"), [(12, 4), (5, 1), (8, 0), (60, 4)])
def test_streaming_equals_a_rolling_cache(w: int, G: int) -> None:
    """StreamingLLM as its paper runs it: a list of kept tokens, positions counted inside the list."""
    T = 50
    kept: list[int] = []
    table: list[list[tuple[int, float]]] = []
    for t in range(T):
        kept.append(t)
        if len(kept) > G + w:
            del kept[G]
        table.append([(j, float(len(kept) - 1 - i)) for i, j in enumerate(kept)])

    # A token between the sinks and the ring stays until the cache is full: within G + w everything is visible.
    def pairs(t: int, h: int) -> list[tuple[int, float]]:
        return [(j, d) for j, d in table[t] if j < G or t - j < w]

    _same(TABLE["streaming"](window=w, sinks=G), T, T, pairs)


def test_streaming_with_true_positions() -> None:
    pattern = TABLE["streaming"](window=12, sinks=4, sink_positions="true")
    _same(pattern, 50, 50, _lm_infinite(50, 50, 12, 4, float("inf")))


def test_prefix_and_bidirectional() -> None:
    _same(TABLE["causal"](prefix=9), 30, 30, lambda t, h: [(j, float(t - j)) for j in range(30) if j <= t or j < 9])
    _same(TABLE["bidirectional"](), 30, 30, lambda t, h: [(j, float(t - j)) for j in range(30)])


@pytest.mark.parametrize(("heads", "kv", "d"), [(6, 1, 8), (6, 6, 8), (6, 3, 64), (2, 2, 16)])
def test_head_layouts(heads: int, kv: int, d: int) -> None:
    q, k, v = _draw(37, 37, heads=heads, kv=kv, d=d)
    want = oracles.attention(q[0], k[0], v[0], lambda t, h: [(j, float(t - j)) for j in range(t + 1)])
    for got in _run(TABLE["causal"](), q, k, v):
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)


def test_a_row_without_keys_is_zero_and_has_no_nan_gradient() -> None:
    q, k, v = (jnp.asarray(x) for x in _draw(20, 20))
    nothing = (Branch(Causal() & Not(Causal())), Branch(Causal() & Not(Causal()), q_positions=3.0, k_positions=0.0))
    for backend in ("dense", "blocked"):

        def f(q: Any, k: Any, v: Any, backend: str = backend) -> Any:
            ctx = _context(q, k, v, Rope(trained=64))
            out, lse = attend(ctx, nothing, backend=backend, block_q=8, block_k=8)
            return out.sum() + 1e-30 * lse.sum(), (out, lse)

        (_, (out, lse)), grads = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)
        assert not out.any() and bool((lse <= NEG / 2).all())
        assert all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("positions", [Rope(trained=64), Alibi()])
def test_gradients_through_output_and_log_sum_exp(softcap: float | None, positions: Any) -> None:
    """Both cotangents, several branches, a soft-cap and a bias: blocked equals the dense reference."""
    q, k, v = (jnp.asarray(x) for x in _draw(45, 45))
    pattern = TABLE["lm_infinite"](window=11, sinks=3, ceiling=11.0)

    def loss(backend: str) -> Any:
        def f(q: Any, k: Any, v: Any) -> Any:
            ctx = _context(q, k, v, positions)
            branches = pattern.branches(ctx)
            out, lse = attend(ctx, branches, backend=backend, softcap=softcap, block_q=8, block_k=16)
            return jnp.sin(3 * out).sum() + jnp.cos(lse).sum()

        return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v)

    (a, ga), (b, gb) = loss("dense"), loss("blocked")
    assert abs(a - b) < 1e-3 * abs(a)
    for x, y in zip(ga, gb, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * float(jnp.abs(x).max()))


def test_merge_is_the_softmax_over_the_union() -> None:
    rng = np.random.default_rng(0)
    s, v = jnp.asarray(rng.normal(size=(5, 12))), jnp.asarray(rng.normal(size=(12, 3)))
    cuts = [(0, 4), (4, 5), (5, 12)]

    def joint(s: Any, v: Any) -> Any:
        return jax.nn.softmax(s, axis=-1) @ v, jax.nn.logsumexp(s, axis=-1)

    def merged(s: Any, v: Any) -> Any:
        parts = [joint(s[:, a:b], v[a:b]) for a, b in cuts]
        return merge([p[0] for p in parts], [p[1] for p in parts])

    for f in (lambda o: o[0], lambda o: o[1]):
        np.testing.assert_allclose(f(merged(s, v)), f(joint(s, v)), rtol=0, atol=1e-6)
    pull = lambda f: jax.grad(lambda s, v: jnp.sin(f(s, v)[0]).sum() + jnp.cos(f(s, v)[1]).sum(), (0, 1))(s, v)  # noqa: E731
    for a, b in zip(pull(merged), pull(joint), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
