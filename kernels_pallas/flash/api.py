"""`flash`: one softmax over the keys a mask leaves, on the implementation that fits the platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import common
from kernels_pallas.common import AUTO, How
from kernels_pallas.flash import cudnn, gpu, reference, table, tpu
from kernels_pallas.flash.problem import Problem, Scores

NAME = "flash"


def flash(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, problem: Problem, how: How = AUTO
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]``, both differentiable; H is a multiple of K.

    A row without keys gives 0 and `NEG`; with sinks, 0 and the sink. `how` may give ``block_q`` and ``block_k``. 'xla'
    and 'reference' hold all logits, O(T S) per head. 'cudnn' rounds the log-sum-exp to the dtype of q.
    Raises UserError for shapes that do not fit each other, and for an implementation that cannot serve.
    """
    common.check_how(NAME, how)
    scores = problem.scores(q_BTHd, k_BSKd)
    local = functools.partial(_local, how)
    if how.mesh is None:
        return local(q_BTHd, k_BSKd, v_BSKd, scores)
    P = jax.sharding.PartitionSpec
    tokens, per_row, per_head = P(how.batch_axis, None, how.head_axis), P(how.batch_axis), P(how.head_axis)
    # One array for all rows of the batch is one row per device here.
    B = q_BTHd.shape[0]
    scores = replace(scores, rows={key: jnp.broadcast_to(a, (B, a.shape[-1])) for key, a in scores.rows.items()})
    heads = [a for a in (scores.slopes_H, scores.sinks_H) if a is not None]
    of_scores = jax.tree.unflatten(jax.tree.structure(scores), [per_row] * len(scores.rows) + [per_head] * len(heads))
    specs = (tokens, tokens, tokens, of_scores)
    return common.mapped(local, how.mesh, specs, (tokens, tokens))(q_BTHd, k_BSKd, v_BSKd, scores)


def _local(how: How, q: jax.Array, k: jax.Array, v: jax.Array, scores: Scores) -> tuple[jax.Array, jax.Array]:
    """On one device."""
    size = how.blocks(NAME, how.chip)
    size = {
        "block_q": min(size["block_q"], _up(q.shape[1], table.LANES)),
        "block_k": min(size["block_k"], _up(k.shape[1], table.LANES)),
    }
    uneven = any(s % table.LANES for s in size.values()) and how.implementation != "interpret"
    on_tpu = f"blocks {size}, on a TPU multiples of {table.LANES}" if uneven else None
    on_gpu = gpu.refusal(q, k, v, how.blocks(NAME, how.hopper))
    kernels, refusals = common.kernel_forms(functools.partial(_tpu, size), gpu.flash, how, (on_tpu, on_gpu))
    forms: dict[str, Callable[..., Any]] = kernels | {
        "cudnn": cudnn.attention,
        "xla": jax.checkpoint(reference.attention),  # nothing of size T S waits for the backward pass
        "reference": _exact,
    }
    refusals["cudnn"] = cudnn.refusal(q, k, scores)
    return common.run(NAME, how, forms, refusals, q, k, v, scores)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _exact(q: jax.Array, *others: object) -> tuple[jax.Array, jax.Array]:
    """All of it in float32, the output rounded at the end."""
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, (q, *others))
    out, lse = reference.attention(*exact)
    return out.astype(q.dtype), lse


def _tpu(
    size: dict[str, int], q: jax.Array, k: jax.Array, v: jax.Array, scores: Scores, how: How
) -> tuple[jax.Array, jax.Array]:
    """Heads lead and lengths are padded to whole blocks; the kernel; and back."""
    (B, T), S = q.shape[:2], k.shape[1]
    block_q, block_k = size["block_q"], size["block_k"]
    n_q, n_k = -(-T // block_q), -(-S // block_k)
    spec = tpu.Spec(
        mask=scores.mask,
        block_q=block_q,
        block_k=block_k,
        n_queries=T,
        n_keys=S,
        offset=scores.offset,
        scale=scores.scale,
        softcap=scores.softcap,
        vmem=common.vmem(how.chip),
        interpret=how.interpret,
    )
    listed = scores.listed((T, S), (block_q, block_k), (n_q, n_k))
    tables = tuple(jnp.asarray(table.pack(listed, n, major)) for major, n in enumerate((n_q, n_k)))
    long = {"q": n_q * block_q, "k": n_k * block_k}

    def heads_lead(x: jax.Array, n: int) -> jax.Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, n - x.shape[1]), (0, 0)))

    def row(name: str, a: jax.Array) -> jax.Array:
        fill = -1 if name.endswith("index") else 0
        a = jnp.broadcast_to(a, (B, a.shape[-1]))
        return jnp.pad(a, ((0, 0), (0, long[name[0]] - a.shape[-1])), constant_values=fill)[:, None]

    out, lse = tpu.attention(
        spec,
        heads_lead(q, long["q"]),
        heads_lead(k, long["k"]),
        heads_lead(v, long["k"]),
        None if scores.slopes_H is None else scores.slopes_H.astype(jnp.float32),
        None if scores.sinks_H is None else scores.sinks_H.astype(jnp.float32),
        {name: row(name, a) for name, a in scores.rows.items()},
        tables,
    )
    return out[:, :, :T].swapaxes(1, 2), lse[:, :, :T].swapaxes(1, 2)
