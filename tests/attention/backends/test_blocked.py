"""The blocked backend: what its program holds in memory, and logits of any size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.attention import BACKENDS, D, H, draw

from lm.attention.attend import attend
from lm.attention.branches import Branch, Context, Keys, Tokens
from lm.attention.masks import Causal
from lm.patterns import TABLE
from lm.positions.nope import NoPE
from lm.positions.rope import Rope


def test_logits_of_any_size() -> None:
    """Logits near 1e4 neither overflow nor lose the softmax: the result is the value of the best key."""
    q, k, v = draw(np.random.default_rng(0), 20, 20)
    q, k = 100 * q, 100 * k
    index = jnp.arange(20, dtype=jnp.int32)[None]
    side = Tokens(index, index.astype(jnp.float32), contiguous=True)
    ctx = Context(q, side, (Keys(k, v, side),), NoPE(), jnp.asarray(20.0), D**-0.5)
    s = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2))
    best = jnp.where(index[0][:, None] >= index, s, -jnp.inf).argmax(-1)[0]
    want = np.stack([np.asarray(v)[0, best[h], h // 2] for h in range(H)], 1)
    both = jax.jit(lambda: [attend(ctx, (Branch(Causal()),), backend=b, block_q=8, block_k=8) for b in BACKENDS])
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
        ctx = Context(q, side, (Keys(k, v, side),), positions, jnp.asarray(float(T)), D**-0.5)
        out, lse = attend(ctx, pattern.branches(ctx), backend=backend, block_q=block, block_k=block)
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
    return Context(x, side, (Keys(x, x, side),), positions, jnp.asarray(float(T)), 1.0)
