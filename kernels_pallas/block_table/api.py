"""`block_table`: one softmax over key blocks that are listed per row, head and query block while the program runs.

What LongHeads (arXiv 2402.10685), InfLLM (2402.04617) and LServe (2502.14866) need once their blocks are chosen.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.block_table import gpu, gpu_plan, reference, tpu
from kernels_pallas.block_table.problem import NAME, Filled, Problem, known
from kernels_pallas.common import AUTO, How, check_how, kernel_forms, known_dtype, mapped, run
from lm.errors import UserError


def block_table(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: jax.Array, problem: Problem, how: How = AUTO
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, d] as `q` and log-sum-exp float32 [B, T, H] of queries over the keys their lists name.

    q [B, T, H, d]; k, v [B, S, K, d] with K a divisor of H, or [B, K, S, d] if `problem.heads_lead`.

    `blocks` int32 [B, H or K, ceil(T / q_block), n]: the lists. With K lists the heads of a key head share one.
    Negative ids are empty entries. A block that is listed twice counts once, at its first entry. Ids past the last
    block are refused where their values are known, and are empty inside a compiled program. A query that sees nothing
    has output 0 and log-sum-exp -inf.

    Gradients reach q, k and v through both results, by the XLA form: the kernel has no backward pass. `how` may give,
    for a TPU, ``entries`` of a grid step and ``kib`` of scalar memory for the lists of one call; for a GPU, keys of a
    ``tile``, ``stages`` and ``fill``. Over a mesh lists follow the heads.
    Raises UserError for shapes, dtypes or ids that do not fit, and for an implementation that cannot serve.
    """
    check_how(NAME, how)
    known_dtype(NAME, q=q, k=k, v=v)
    if q.ndim != 4 or k.ndim != 4:
        raise UserError(f"{NAME}: q {q.shape}, k {k.shape}; valid: q [B, T, H, d], k [B, S, K, d]")
    if not problem.heads_lead:
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2) if v.ndim == 4 else v
    _check_shapes(q, k, v)
    _check_lists(q, k, blocks, problem)
    for name, given in how.sizes:
        least = 16 if name == "tile" else 1
        if given < least:
            raise UserError(f"{NAME}: {name} {given}; valid: at least {least}{' KiB' if name == 'kib' else ''}")
    filled = problem.filled(q, k.shape[2], blocks)
    local = functools.partial(_attend, how)
    if how.mesh is None:
        return local(q, k, v, blocks, filled)
    P = jax.sharding.PartitionSpec
    tokens, lead, per_row = P(how.batch_axis, None, how.head_axis), P(how.batch_axis, how.head_axis), P(how.batch_axis)
    of_turns = [] if filled.turn is None else [lead, P()]
    of_problem = jax.tree.unflatten(jax.tree.structure(filled), [per_row, per_row, *of_turns])
    specs = (tokens, lead, lead, lead, of_problem)
    return mapped(local, how.mesh, specs, (tokens, tokens))(q, k, v, blocks, filled)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """With the heads of `k` and `v` in front."""
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    if k.shape != (B, K, S, d) or v.shape != k.shape or not K or H % K or not S or not T:
        raise UserError(
            f"{NAME}: q {q.shape}, heads-first k {k.shape} and v {v.shape}; valid: k and v alike, {B} rows, width {d}, "
            f"key heads a divisor of {H}, at least one key and query"
        )


def _check_lists(q: jax.Array, k: jax.Array, blocks: jax.Array, problem: Problem) -> None:
    """Their shape, and their ids where they are known."""
    (B, T, H, _), (K, S) = q.shape, k.shape[1:3]
    block_size, q_block = problem.block_size, problem.q_block
    for name, size in (("block_size", block_size), ("q_block", q_block)):
        if size < 1:
            raise UserError(f"{NAME}: {name} {size}; valid: at least 1")
    Q = -(-T // q_block)
    ok = blocks.ndim == 4 and blocks.shape[:3] in ((B, H, Q), (B, K, Q)) and blocks.shape[3] > 0
    if not ok or blocks.dtype != jnp.int32:
        raise UserError(
            f"{NAME}: blocks {blocks.dtype}{list(blocks.shape)}; valid: int32 [{B}, {H} or {K}, {Q}, n], a list for "
            f"every {q_block} of {T} queries"
        )
    N = -(-S // block_size)
    ends = known(blocks)
    if ends and ends[1] >= N:
        raise UserError(f"{NAME}: block {ends[1]} of {N}; valid: 0 to {N - 1}, or negative for none")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    how: How, q: jax.Array, k: jax.Array, v: jax.Array, blocks: jax.Array, problem: Filled
) -> tuple[jax.Array, jax.Array]:
    on_tpu = tpu.refusal(q, k, blocks, problem, tiled=how.implementation != "interpret")
    on_gpu = gpu_plan.refusal(q, k, blocks, problem, how)
    forms, refusals = kernel_forms(tpu.attention, gpu.attention, how, (on_tpu, on_gpu))
    forms |= {"reference": reference.reference, "xla": reference.xla}
    return run(NAME, how, forms, refusals, q, k, v, blocks, problem)


def _forward(how: How, *args: Any) -> Any:
    return _attend(how, *args), args


def _backward(how: How, args: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    _, pull = jax.vjp(lambda q, k, v: reference.xla(q, k, v, *args[3:]), *args[:3])
    return (*pull(cotangents), None, None)


_attend.defvjp(_forward, _backward)
