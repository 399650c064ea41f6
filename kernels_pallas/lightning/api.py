"""Linear attention with a scalar decay per head (Lightning Attention, arXiv 2401.04658), any initial state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import check_chip, known_dtype, run
from kernels_pallas.lightning import gpu, reference, tpu
from lm.errors import UserError

NAME = "lightning"
Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
Static = tuple[str, str | None, int | None, int | None]


def _check(q: Any, k: Any, v: Any, decay: Any, state: Any, chunk: int | None, stages: int | None) -> None:
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
    if chunk is not None and (chunk < 8 or chunk % 8):
        raise UserError(f"{NAME}: chunk {chunk}; valid: a multiple of 8")
    if stages is not None and stages < 1:
        raise UserError(f"{NAME}: stages {stages}; valid: at least 1")


def _scan(
    static: Static,
    q_BHTD: jax.Array,
    k_BHTD: jax.Array,
    v_BHTE: jax.Array,
    rate_H: jax.Array,
    state_BHDE: jax.Array,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    implementation, chip, chunk, stages = static
    xla = functools.partial(reference.chunked, reverse=reverse, chunk=chunk)
    kernel = functools.partial(tpu.chunked, reverse=reverse, chunk=chunk, chip=chip)
    hopper = functools.partial(gpu.chunked, reverse=reverse, chip=chip, stages=stages)
    forms: dict[str, Callable[..., Any]] = {
        "xla": xla,
        "tpu": kernel,
        "interpret": functools.partial(kernel, interpret=True),
        "gpu": hopper,
        "interpret_gpu": functools.partial(hopper, interpret=True),
    }
    on_tpu, on_gpu = tpu.refusal(q_BHTD, v_BHTE), gpu.refusal(q_BHTD, chunk, chip, stages)
    refusals = {"tpu": on_tpu, "interpret": on_tpu, "gpu": on_gpu, "interpret_gpu": on_gpu}
    return run(NAME, implementation, forms, refusals, q_BHTD, k_BHTD, v_BHTE, rate_H, state_BHDE, chip=chip)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _scan(static, *arrays)


def _forward(static: Any, *arrays: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    return _scan(static, *arrays), arrays


def _backward(static: Any, saved: Arrays, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    """Three scans, each with the roles of q, k, v and the state exchanged; nothing but the inputs was kept.

    With G the cotangent of the final state, in the notation of reference.py:
        dq = forward(do, v, k; S0^T)      dk = reverse(v, do, q; G^T)      dv, dS0 = reverse(k, q, do; G)
    """
    q, k, v, rate, state = saved
    do, G = cotangents
    do = do.astype(q.dtype)
    dq, _ = _scan(static, do, v, k, rate, jnp.swapaxes(state, 2, 3))
    dk, _ = _scan(static, v, do, q, rate, jnp.swapaxes(G, 2, 3), reverse=True)
    dv, dstate = _scan(static, k, q, do, rate, G, reverse=True)
    return dq, dk, dv, None, dstate.astype(state.dtype)


_attend.defvjp(_forward, _backward)


def lightning(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    state: jax.Array | None = None,
    *,
    implementation: str = "auto",
    chip: str | None = None,
    chunk: int | None = None,
    stages: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``o_t = q_t S_t``, ``S_t = decay S_{t-1} + k_t^T v_t`` -> (o [B, T, H, E], final state float32 [B, H, D, E]).

    q, k [B, T, H, D] and v [B, T, H, E], all bfloat16 or all float32; decay [H] in (0, 1]; `state` is S_0 [B, H, D, E],
    zeros if None. The caller scales q. T need not be a multiple of anything; two calls with the state handed on are
    one call. Gradients to q, k, v and the initial state, from both results; the decay is a constant. `chunk` and
    `chip` choose the tokens of a chunk, on a GPU `stages` the chunks fetched ahead (`kernels_pallas.common.BLOCKS`).
    'reference' goes token by token.
    Raises UserError for shapes or dtypes that do not fit each other, and for an implementation that cannot serve.
    """
    check_chip(NAME, chip)
    _check(q, k, v, decay, state, chunk, stages)
    B, T, H, D = q.shape
    if state is None:
        state = jnp.zeros((B, H, D, v.shape[3]), jnp.float32)
    decay = jax.lax.stop_gradient(decay.astype(jnp.float32))
    if implementation == "reference":
        return reference.recurrent(q, k, v, decay, state)
    heads = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out, last = _attend((implementation, chip, chunk, stages), *heads, jnp.log(decay), state)
    return jnp.swapaxes(out, 1, 2), last
