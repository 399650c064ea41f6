"""`branches`: one softmax over a union of disjoint branches, each with a mask and positions of its own.

LM-Infinite (arXiv 2308.16137, section 4) is two: a window at true distances, and the first tokens from the ceiling of
distances. Self-Extend (2401.01325) is two: near keys at true, far keys at grouped distances. A branch is a call of
`kernels_pallas.flash`, which returns the log-sum-exp, and takes gradients through it; so the union is exact and trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from kernels_pallas.branches import reference
from kernels_pallas.branches.merging import merge
from kernels_pallas.branches.part import PLAIN, Part, Problem
from kernels_pallas.common import AUTO, NEG, How
from kernels_pallas.flash.api import flash
from lm.errors import UserError

NAME = "branches"


def branches(
    parts: Sequence[Part], v_BSKd: jax.Array, problem: Problem = PLAIN, how: How = AUTO
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]``, differentiable in q, k, v, slopes and sinks.

    Values are the same in every part. `how` goes to every call of `flash`; 'reference' takes one softmax over the
    logits of all parts side by side.
    Raises UserError for parts that do not fit each other, and for what `flash` refuses.
    """
    T = _check(parts, v_BSKd, problem.n_queries)
    whole = next((n for n, part in enumerate(parts) if part.q_BTHd.shape[1] == T), None)
    if problem.sinks_H is not None and whole is None:
        raise UserError(f"{NAME}: sinks_H, and no part has all {T} queries; valid: one that has, its mask may be empty")
    if problem.scale is None:
        problem = replace(problem, scale=parts[0].q_BTHd.shape[-1] ** -0.5)
    if how.implementation == "reference":
        return reference.union(parts, v_BSKd, T, problem)
    outs, lses = [], []
    for n, part in enumerate(parts):
        own = problem.of_part(part, sinks=n == whole, alone=len(parts) == 1)
        out, lse = flash(part.q_BTHd, part.k_BSKd, v_BSKd, own, how)
        rest = T - out.shape[1]
        outs.append(jnp.pad(out, ((0, 0), (rest, 0), (0, 0), (0, 0))))
        lses.append(jnp.pad(lse, ((0, 0), (rest, 0), (0, 0)), constant_values=NEG))
    return merge(outs, lses)


def _check(parts: Sequence[Part], v_BSKd: jax.Array, n_queries: int | None) -> int:
    """The number of queries."""
    if not parts:
        raise UserError(f"{NAME}: no parts; valid: at least one")
    B, _, H, d = parts[0].q_BTHd.shape
    T = max(part.q_BTHd.shape[1] for part in parts) if n_queries is None else n_queries
    for n, part in enumerate(parts):
        q, k = part.q_BTHd.shape, part.k_BSKd.shape
        if (q[0], *q[2:]) != (B, H, d) or not 0 < q[1] <= T or k != v_BSKd.shape:
            raise UserError(
                f"{NAME}: part {n} has queries {q} and keys {k}; valid: queries [{B}, 1 to {T}, {H}, {d}], keys like "
                f"the values, {v_BSKd.shape}"
            )
    return T
