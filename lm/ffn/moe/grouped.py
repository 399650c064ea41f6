"""Sorted rows through stacked experts: each row with the matrices of its group, and the weighted sum by token.

On accelerators products of `jax.lax.ragged_dot`. XLA's CPU backend lowers that to one product per expert over *all*
rows, E times the work, so there it is a loop over experts, and within each over blocks of its rows, that does a whole
expert at once: a block's rows are fetched, multiplied, activated and multiplied again while they are in the cache. Its
gradient is such a loop too. Letters: N tokens, k experts each, M = N k rows, D and F widths, E experts, W = F or 2 F
(up, and gate beside it), b rows of a block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import unknown
from lm.ffn.base import Activated

IMPLEMENTATIONS = ("auto", "ragged", "blocks")
# "up" [E, D, F], "down" [E, F, D], and "gate" [E, D, F] of a gated layer; "up_bias" and "gate_bias" [E, F], or none
Weights = dict[str, jax.Array]


def mixture(
    x_ND: jax.Array,
    weights: Weights,
    gates_Nk: jax.Array,
    order_M: jax.Array,
    place_Nk: jax.Array,
    sizes_E: jax.Array,
    kind: Activated,
    implementation: str = "auto",
) -> jax.Array:
    """``y[n] = sum_j gates[n, j] down_e(kind.inner(up_e x[n], gate_e x[n]))``, e the expert of row ``place[n, j]``.

    `order` ``[M]`` int32: the assignment ``n k + j`` of each row, rows sorted by expert; `place` ``[N, k]``: inverse;
    `sizes` ``[E]`` int32: rows of each expert. Rows beyond ``sum(sizes)`` are nobody's and add ``0 * gate``. Without
    ``weights["gate"]`` an expert is ``down(kind.inner(up x))``. Differentiable in x, weights and gates.
    `implementation`: ``ragged``, ``blocks``, or ``auto``: by the platform the program is lowered for.
    """
    if implementation not in IMPLEMENTATIONS:
        raise unknown("model.ffn.implementation", implementation, IMPLEMENTATIONS)
    if sizes_E.shape[0] == 1:  # a plain layer, by the plain layer's operations
        rows = x_ND[order_M // gates_Nk.shape[1]]
        one = {name: w[0] for name, w in weights.items()}

        def product(name: str) -> jax.Array:
            return rows @ one[name] + one[f"{name}_bias"] if f"{name}_bias" in one else rows @ one[name]

        gated = "gate" in one
        inner = kind.opened(product("gate")) * kind.passed(product("up")) if gated else kind.opened(product("up"))
        live = jnp.arange(len(order_M))[:, None] < sizes_E[0]
        return _combine(jnp.where(live, inner @ one["down"], jnp.zeros((), x_ND.dtype)), gates_Nk, place_Nk)
    return _mixture(kind, implementation, x_ND, weights, gates_Nk, order_M, place_Nk, sizes_E)


def block(M: int, E: int) -> int:
    """Rows of a block: large enough that a matrix serves many rows, small enough that few of a group's last are
    idle."""
    return max(8, min(256, 1 << max(M // max(E, 1), 1).bit_length() - 1))


def _combine(out_MD: jax.Array, gates_Nk: jax.Array, place_Nk: jax.Array) -> jax.Array:
    return jnp.einsum("nkd,nk->nd", out_MD[place_Nk], gates_Nk.astype(out_MD.dtype))


def _inner(kind: Activated, h_mW: jax.Array, gated: bool) -> jax.Array:
    """What goes into the last product: h is up alone, or up with the gate beside it."""
    return kind.inner(*jnp.split(h_mW, 2, -1)) if gated else kind.inner(h_mW)


def _inward(weights: Weights) -> jax.Array:
    """``[..., D, W]``."""
    return jnp.concatenate([weights["up"], weights["gate"]], -1) if "gate" in weights else weights["up"]


def _bias(weights: Weights) -> jax.Array | None:
    """``[..., W]``, None where there is none."""
    if "up_bias" not in weights:
        return None
    return jnp.concatenate([weights["up_bias"], weights["gate_bias"]], -1) if "gate" in weights else weights["up_bias"]


def _of_rows(bias_EW: jax.Array, M: int, sizes_E: jax.Array) -> jax.Array:
    """``[M, W]``: every sorted row's bias; the last expert's beyond them."""
    return jnp.repeat(bias_EW, sizes_E.at[-1].add(M - sizes_E.sum()), 0, total_repeat_length=M)


def _choose(implementation: str, blocks: Any, ragged: Any, *args: Any) -> Any:
    if implementation != "auto":
        return (blocks if implementation == "blocks" else ragged)(*args)
    return jax.lax.platform_dependent(*args, cpu=blocks, default=ragged)


def _forward(
    kind: Activated,
    implementation: str,
    x: Any,
    weights: Weights,
    gates: Any,
    order: Any,
    place: Any,
    sizes: Any,
) -> tuple[jax.Array, Any]:
    M, E = len(order), len(sizes)
    tokens, gated = order // gates.shape[1], "gate" in weights

    def blocks(x: Any, weights: Weights, tokens: Any, sizes: Any) -> tuple[jax.Array, jax.Array]:
        b = block(M, E)
        tokens = jnp.pad(tokens, (0, b))

        def expert(carry: Any, of: Any) -> tuple[Any, None]:
            weights, first, size = of
            inward, bias = _inward(weights), _bias(weights)

            def step(i: jax.Array, carry: Any) -> Any:
                # What a group's last block writes beyond its rows, the next group writes again.
                (y, h), at = carry, first + i * b
                mine = x[jax.lax.dynamic_slice(tokens, (at,), (b,))] @ inward
                mine = mine if bias is None else mine + bias
                out = _inner(kind, mine, gated) @ weights["down"]
                out = jnp.where(_inside(b, size - i * b), out, jnp.zeros((), out.dtype))
                put = jax.lax.dynamic_update_slice
                return put(y, out, (at, 0)), put(h, mine, (at, 0))

            return jax.lax.fori_loop(0, (size + b - 1) // b, step, carry), None

        y = jnp.zeros((M + b, x.shape[1]), x.dtype)
        h = jnp.zeros((M + b, _inward(weights).shape[-1]), x.dtype)
        y, h = jax.lax.scan(expert, (y, h), (weights, jnp.cumsum(sizes) - sizes, sizes))[0]
        return y[:M], h[:M]

    def ragged(x: Any, weights: Weights, tokens: Any, sizes: Any) -> tuple[jax.Array, jax.Array]:
        h, bias = _ragged(x[tokens], _inward(weights), sizes), _bias(weights)
        h = h if bias is None else h + _of_rows(bias, M, sizes)
        y = _ragged(_inner(kind, h, gated), weights["down"], sizes)
        return jnp.where(_inside(M, sizes.sum()), y, jnp.zeros((), y.dtype)), h

    y, h = _choose(implementation, blocks, ragged, x, weights, tokens, sizes)
    return _combine(y, gates, place), (x, weights, gates, order, place, sizes, h)


def _sums(d_MW: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """``[E, W]`` float32: the sum of each group's rows; those of nobody are zero."""
    ends = jnp.cumsum(sizes_E)
    whose = jnp.searchsorted(ends, jnp.arange(len(d_MW)), side="right")
    return jax.ops.segment_sum(d_MW.astype(jnp.float32), whose, len(sizes_E))


def _inside(b: int, size: jax.Array) -> jax.Array:
    return jnp.arange(b)[:, None] < size


def _backward(kind: Activated, implementation: str, saved: Any, d_y: jax.Array) -> Any:
    x, weights, gates, order, place, sizes, h = saved
    (M, E, k), gated = (len(order), len(sizes), gates.shape[1]), "gate" in weights
    gates_M = gates.reshape(-1)[order]

    def through(h: Any, d_inner: Any, gates: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The inner activations times their gates, d h, and d gates; `d_inner` is without the gates."""
        inner, pull = jax.vjp(lambda h: _inner(kind, h, gated), h)
        d_gate = (inner.astype(jnp.float32) * d_inner.astype(jnp.float32)).sum(-1)
        by = gates[:, None].astype(inner.dtype)
        return inner * by, pull(d_inner * by)[0], d_gate

    def outer(a: Any, b: Any) -> jax.Array:
        return jnp.dot(a.T, b, preferred_element_type=jnp.float32)

    def blocks(x: Any, weights: Weights, h: Any, d_y: Any, tokens: Any, gates: Any, sizes: Any) -> Any:
        b = block(M, E)
        tokens, gates = jnp.pad(tokens, (0, b)), jnp.pad(gates, (0, b))
        h = jnp.pad(h, ((0, b), (0, 0)))

        def expert(carry: Any, of: Any) -> tuple[Any, Any]:
            weights, first, size = of
            biased = _bias(weights) is not None
            inward_T, down_T = _inward(weights).T, weights["down"].T

            def step(i: jax.Array, carry: Any) -> Any:
                d_x, d_gates, d_inward, d_down, *d_bias = carry
                at, live = first + i * b, _inside(b, size - i * b)
                rows = jax.lax.dynamic_slice(tokens, (at,), (b,))
                own = jnp.where(live, d_y[rows], jnp.zeros((), d_y.dtype))
                mine = jax.lax.dynamic_slice(h, (at, 0), (b, h.shape[1]))
                inner, d_h, d_gate = through(mine, own @ down_T, jax.lax.dynamic_slice(gates, (at,), (b,)))
                return (
                    jax.lax.dynamic_update_slice(d_x, d_h @ inward_T, (at, 0)),
                    jax.lax.dynamic_update_slice(d_gates, d_gate, (at,)),
                    d_inward + outer(x[rows], d_h),
                    d_down + outer(inner, own),
                    *(d + d_h.sum(0, dtype=jnp.float32) for d in d_bias),
                )

            shapes = [inward_T.shape[::-1], down_T.shape[::-1], *[inward_T.shape[:1]] * biased]
            sums = [jnp.zeros(shape, jnp.float32) for shape in shapes]
            d_x, d_gates, *sums = jax.lax.fori_loop(0, (size + b - 1) // b, step, (*carry, *sums))
            return (d_x, d_gates), tuple(sums)

        carry = jnp.zeros((M + b, x.shape[1]), x.dtype), jnp.zeros(M + b, jnp.float32)
        (d_x, d_gates), sums = jax.lax.scan(expert, carry, (weights, jnp.cumsum(sizes) - sizes, sizes))
        return d_x[:M], d_gates[:M], *sums

    def ragged(x: Any, weights: Weights, h: Any, d_y: Any, tokens: Any, gates: Any, sizes: Any) -> Any:
        inward, live = _inward(weights), _inside(M, sizes.sum())
        own = jnp.where(live, d_y[tokens], jnp.zeros((), d_y.dtype))
        h = jnp.where(live, h, jnp.zeros((), h.dtype))
        d_inner = _ragged(own, jnp.swapaxes(weights["down"], 1, 2), sizes)
        inner, d_h, d_gate = through(h, jnp.where(live, d_inner, jnp.zeros((), h.dtype)), gates)
        d_x = _ragged(d_h, jnp.swapaxes(inward, 1, 2), sizes)
        d_x = jnp.where(live, d_x, jnp.zeros((), d_x.dtype))
        d_inward, d_down = (
            _ragged_outer(x[tokens], d_h, inward, sizes),
            _ragged_outer(inner, own, weights["down"], sizes),
        )
        d_bias = () if _bias(weights) is None else (_sums(d_h, sizes),)
        return d_x, d_gate, d_inward.astype(jnp.float32), d_down.astype(jnp.float32), *d_bias

    d_x, d_gates, d_inward, d_down, *d_bias = _choose(
        implementation, blocks, ragged, x, weights, h, d_y, order // k, gates_M, sizes
    )
    d_x = d_x[place].sum(1).astype(x.dtype)
    d_weights = {"down": d_down.astype(weights["down"].dtype)}
    parts = jnp.split(d_inward, 2, -1) if gated else (d_inward,)
    d_weights |= {n: d.astype(weights[n].dtype) for n, d in zip(("up", "gate"), parts, strict=False)}
    for d in d_bias:
        names = ("up_bias", "gate_bias") if gated else ("up_bias",)
        own = jnp.split(d, len(names), -1)
        d_weights |= {n: part.astype(weights[n].dtype) for n, part in zip(names, own, strict=True)}
    return d_x, d_weights, d_gates[place].astype(gates.dtype), None, None, None


def _value(kind: Activated, implementation: str, *args: Any) -> jax.Array:
    return _forward(kind, implementation, *args)[0]


_mixture = jax.custom_vjp(_value, nondiff_argnums=(0, 1))
_mixture.defvjp(_forward, _backward)


@jax.custom_batching.sequential_vmap  # the primitive's own batching rule does not cover stacked matrices
def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w, sizes)


@jax.custom_batching.sequential_vmap
def _ragged_outer(x: jax.Array, dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """``[E, K, N]``: the sum over each group's rows of ``x^T dy``."""
    return jax.vjp(lambda w: jax.lax.ragged_dot(x, w, sizes), w)[1](dy)[0]
