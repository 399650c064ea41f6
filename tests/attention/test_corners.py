"""Where branches, tiles, segments and padding meet: random masks against numpy; what a program holds in memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lm.attention.attend import attend
from lm.attention.branches import NEG, Branch, Context, Tokens, merge
from lm.attention.masks import And, Causal, Chunked, Full, Mask, Not, Or, Prefix, Sinks, Window
from lm.attention.tiles import Grid, visit
from lm.patterns import TABLE
from lm.positions.alibi import Alibi, slopes
from lm.positions.nope import NoPE
from lm.positions.rope import Rope

H, K, D = 4, 2, 8
BACKENDS = ("dense", "blocked")


def draw(rng: np.random.Generator, T: int, S: int, B: int = 1) -> tuple[jax.Array, ...]:
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


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


def reference(q: Any, k: Any, v: Any, seen_BTS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in float64; a row that sees nothing gives 0 and `NEG`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = np.einsum("bthd,bshd->bths", q, np.repeat(k, H // K, 2)) / np.sqrt(D)
    s = np.where(seen_BTS[:, :, None], s, -np.inf)
    with np.errstate(all="ignore"):
        lse = np.log(np.exp(s).sum(-1))
        p = np.nan_to_num(np.exp(s - lse[..., None]), nan=0.0)
    return np.einsum("bths,bshd->bthd", p, np.repeat(v, H // K, 2)), np.where(np.isinf(lse), NEG, lse)


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
            ctx = Context(q, k, side, side, NoPE(), jnp.asarray(float(T)), D**-0.5)
            out, lse = attend(ctx, v, branches, backend=backend, block_q=bq, block_k=bk)
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
        ctx = Context(q, k, side, side, positions, jnp.asarray(float(T)), D**-0.5)
        return attend(ctx, v, pattern.branches(ctx), softcap=1e4, backend=backend, block_q=8, block_k=8)[0]

    want = oracles.attention(q[0], k[0], v[0], pairs, slopes=slopes(H) if alibi else None)
    for backend in BACKENDS:
        out = run(q, k, v, backend)
        np.testing.assert_allclose(out[0], want, rtol=0, atol=2e-5)


def test_a_ceiling_need_not_be_a_whole_number() -> None:
    q, k, v = draw(np.random.default_rng(2), 24, 24)
    pattern = TABLE["lm_infinite"](window=9, sinks=2, ceiling=4.5)
    side = Tokens(jnp.arange(24, dtype=jnp.int32)[None], jnp.arange(24.0)[None], contiguous=True)
    ctx = Context(q, k, side, side, Rope(trained=64), jnp.asarray(24.0), D**-0.5)
    want = oracles.attention(
        q[0], k[0], v[0], lambda t, h: [(j, min(t - j, 4.5)) for j in range(t + 1) if t - j < 9 or j < 2]
    )
    both = jax.jit(lambda: [attend(ctx, v, pattern.branches(ctx), backend=b, block_q=8, block_k=8) for b in BACKENDS])
    for out, _ in both():
        np.testing.assert_allclose(out[0], want, rtol=0, atol=2e-6)


def test_logits_of_any_size() -> None:
    """Logits near 1e4 neither overflow nor lose the softmax: the result is the value of the best key."""
    q, k, v = draw(np.random.default_rng(0), 20, 20)
    q, k = 100 * q, 100 * k
    index = jnp.arange(20, dtype=jnp.int32)[None]
    side = Tokens(index, index.astype(jnp.float32), contiguous=True)
    ctx = Context(q, k, side, side, NoPE(), jnp.asarray(20.0), D**-0.5)
    s = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2))
    best = jnp.where(index[0][:, None] >= index, s, -jnp.inf).argmax(-1)[0]
    want = np.stack([np.asarray(v)[0, best[h], h // 2] for h in range(H)], 1)
    both = jax.jit(lambda: [attend(ctx, v, (Branch(Causal()),), backend=b, block_q=8, block_k=8) for b in BACKENDS])
    for out, lse in both():
        assert float(jnp.abs(lse).max()) > 1e4
        np.testing.assert_allclose(out[0], want, rtol=0, atol=1e-3)


def _equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(
    "pattern",
    [
        TABLE["causal"](),
        TABLE["sliding_window"](window=64),
        TABLE["streaming"](window=64, sinks=4),
        TABLE["lm_infinite"](window=64, sinks=4, ceiling=64.0),
    ],
    ids=lambda p: type(p).__name__,
)
def test_the_blocked_program_holds_no_square(pattern: Any) -> None:
    """Forward and backward at 1024 tokens: no array reaches T * S, and loops run over the non-empty tiles only."""
    T, block = 1024, 32
    index = jax.ShapeDtypeStruct((1, T), jnp.int32)
    q = jax.ShapeDtypeStruct((1, T, 2, D), jnp.float32)
    positions = Rope(trained=T)

    def loss(q: Any, k: Any, v: Any, index: Any, backend: str) -> Any:
        side = Tokens(index, index.astype(jnp.float32), contiguous=True)
        ctx = Context(q, k, side, side, positions, jnp.asarray(float(T)), D**-0.5)
        out, lse = attend(ctx, v, pattern.branches(ctx), backend=backend, block_q=block, block_k=block)
        return out.sum() + lse.sum()

    def program(backend: str) -> list[Any]:
        grad = jax.grad(lambda q, k, v, index: loss(q, k, v, index, backend), (0, 1, 2))
        return list(_equations(jax.make_jaxpr(grad)(q, q, q, index).jaxpr))

    def largest(equations: list[Any]) -> int:
        return max(int(np.prod(v.aval.shape)) for e in equations for v in e.outvars if hasattr(v.aval, "shape"))

    blocked = program("blocked")
    assert largest(blocked) <= T * 2 * D < T * T <= largest(program("dense"))
    loops = sorted(e.params["length"] for e in blocked if e.primitive.name == "scan")
    tokens = np.arange(T)
    counts = []
    for branch in pattern.branches(_context_of(T, positions)):
        seen = np.asarray(branch.mask(tokens[:, None], tokens[None]), bool).reshape(T // block, block, -1, block)
        counts.append(int(seen.any((1, 3)).sum()))
    assert loops == sorted(counts * 2)


def _context_of(T: int, positions: Any) -> Context:
    x, index = jnp.zeros((1, T, 2, D)), jnp.arange(T, dtype=jnp.int32)[None]
    side = Tokens(index, index.astype(jnp.float32), contiguous=True)
    return Context(x, x, side, side, positions, jnp.asarray(float(T)), 1.0)


def test_a_tile_that_ends_beyond_the_keys_is_never_whole() -> None:
    whole = visit(Full(), Grid(20, 20, 8, 8))
    assert whole.tolist() == [[i, j, int(j < 2)] for i in range(3) for j in range(3)]


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


def test_a_window_costs_by_its_width_and_sinks_by_their_number() -> None:
    def tiles(mask: Mask, n: int) -> int:
        return len(visit(mask, Grid(n, n, 64, 64)))

    near, far = Causal() & Window(256), Sinks(10) & ~Window(256)
    for mask, each in ((near, 5), (far, 1)):
        assert tiles(mask, 16384) - tiles(mask, 8192) == 128 * each
    assert tiles(Causal(), 8192) == 128 * 129 // 2


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
        ctx = Context(q, k, side, side, NoPE(), jnp.asarray(21.0), D**-0.5)
        branches = (Branch(near), Branch(far, rows=rows))
        return [attend(ctx, v, branches, backend=b, block_q=8, block_k=5) for b in BACKENDS]

    for out, lse in both(q, k, v):
        np.testing.assert_allclose(out, want, rtol=0, atol=3e-6)
        np.testing.assert_allclose(lse, want_lse, rtol=0, atol=3e-6)
