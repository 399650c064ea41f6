"""Linear attention with a scalar decay per head (Lightning Attention, arXiv 2401.04658), any initial state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import AUTO, How, Shaped, check_how, kernel_forms, known_dtype, run
from kernels_pallas.lightning import gpu, reference, tpu
from kernels_pallas.lightning.problem import Problem
from lm.errors import UserError

NAME = "lightning"
Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _check(q: Shaped, k: Shaped, v: Shaped, decay: Shaped, state: Shaped | None, how: How) -> None:
    known_dtype(NAME, q=q, k=k, v=v)
    if q.ndim != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3] or v.ndim != 4:
        raise UserError(f"{NAME}: q {q.shape}, k {k.shape}, v {v.shape}; valid: q and k [B, T, H, D], v [B, T, H, E]")
    B, T, H, D = q.shape
    if not T:
        raise UserError(f"{NAME}: no tokens; valid: T of 1 or more")
    if decay.shape != (H,):
        raise UserError(f"{NAME}: decay {decay.shape}; valid: one per head, ({H},), greater than 0 and at most 1")
    if state is not None and state.shape != (B, H, D, v.shape[3]):
        raise UserError(f"{NAME}: state {state.shape}; valid: [B, H, D, E], here {(B, H, D, v.shape[3])}")
    chunk, stages = how.size("chunk"), how.size("stages")
    if chunk is not None and (chunk < 8 or chunk % 8):
        raise UserError(f"{NAME}: chunk {chunk}; valid: a multiple of 8")
    if stages is not None and stages < 1:
        raise UserError(f"{NAME}: stages {stages}; valid: at least 1")


def _scan(how: How, q: jax.Array, k: jax.Array, v: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """q, k [B, H, T, D], v [B, H, T, E]."""
    forms, refusals = kernel_forms(tpu.chunked, gpu.chunked, how, (tpu.refusal(q, v), gpu.refusal(q, how)))
    forms["xla"] = functools.partial(reference.chunked, chunk=how.size("chunk"))
    return run(NAME, how, forms, refusals, q, k, v, problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    how: How, q: jax.Array, k: jax.Array, v: jax.Array, rate: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _scan(how, q, k, v, Problem(rate, state))


def _forward(how: How, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    q, k, v, rate, state = arrays
    return _scan(how, q, k, v, Problem(rate, state)), arrays


def _backward(how: How, saved: Arrays, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
    """Three scans, each with the roles of q, k, v and the state exchanged; nothing but the inputs was kept.

    With G the cotangent of the final state, in the notation of reference.py:
        dq = forward(do, v, k; S0^T)      dk = reverse(v, do, q; G^T)      dv, dS0 = reverse(k, q, do; G)
    """
    q, k, v, rate, state = saved
    do, G = cotangents
    do = do.astype(q.dtype)
    dq, _ = _scan(how, do, v, k, Problem(rate, jnp.swapaxes(state, 2, 3)))
    dk, _ = _scan(how, v, do, q, Problem(rate, jnp.swapaxes(G, 2, 3), reverse=True))
    dv, dstate = _scan(how, k, q, do, Problem(rate, G, reverse=True))
    return dq, dk, dv, None, dstate.astype(state.dtype)


_attend.defvjp(_forward, _backward)


def lightning(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    state: jax.Array | None = None,
    how: How = AUTO,
) -> tuple[jax.Array, jax.Array]:
    """``o_t = q_t S_t``, ``S_t = decay S_{t-1} + k_t^T v_t`` -> (o [B, T, H, E], final state float32 [B, H, D, E]).

    q, k [B, T, H, D] and v [B, T, H, E], all bfloat16 or all float32; decay [H] in (0, 1]; `state` is S_0 [B, H, D, E],
    zeros if None. The caller scales q. T need not be a multiple of anything. Two calls with the state handed on are one
    call. Gradients reach q, k, v and the initial state, from both results; the decay is a constant. `how` may give the
    tokens of a ``chunk``, on a GPU the chunks fetched ahead, ``stages``. 'reference' goes token by token.
    Raises UserError for shapes or dtypes that do not fit each other, and for an implementation that cannot serve.
    """
    check_how(NAME, how)
    _check(q, k, v, decay, state, how)
    B, T, H, D = q.shape
    if state is None:
        state = jnp.zeros((B, H, D, v.shape[3]), jnp.float32)
    decay = jax.lax.stop_gradient(decay.astype(jnp.float32))
    if how.implementation == "reference":
        return reference.recurrent(q, k, v, decay, state)
    heads = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out, last = _attend(how, *heads, jnp.log(decay), state)
    return jnp.swapaxes(out, 1, 2), last
