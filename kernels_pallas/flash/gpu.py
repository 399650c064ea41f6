"""Flash attention for Hopper through Mosaic GPU: what it serves, padding, and the gradient around the kernels.

Kernels: `gpu_forward`, `gpu_backward`, with `gpu_tile` between them. bfloat16 only: the matrix unit has no float32. The
sequence stays where it is, ``[B, T, H, d]``: copies by TMA cut tiles out of any layout, so nothing is transposed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import AUTO, NEG, How, Shaped
from kernels_pallas.flash import gpu_backward, gpu_forward, per_head
from kernels_pallas.flash.gpu_tile import LOG2E, ROWS, Shape, Spec, Table, smem_bytes, tables
from kernels_pallas.flash.problem import Rows, Scores
from kernels_pallas.flash.tpu import FAR

WIDEST = 256


def refusal(q: Shaped, k: Shaped, v: Shaped, size: dict[str, int]) -> str | None:
    """Why the kernel cannot serve this call, or None. `size`: ``block_q``, ``block_k``."""
    T, d = q.shape[1], q.shape[-1]
    odd = next((str(a.dtype) for a in (q, k, v) if a.dtype != jnp.bfloat16), None)
    reasons = {
        f"dtype {odd} (valid: bfloat16)": odd is not None,
        f"heads wider than {WIDEST} ({d})": d > WIDEST,
        f"fewer than {ROWS} queries ({T}): a block per head leaves most of a GPU idle": T < ROWS,
        f"blocks {size}, on a GPU 64 or 128": not set(size.values()) <= {64, 128},
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def shapes(d: int, size: dict[str, int]) -> dict[str, Shape]:
    """Tile sizes of every kernel for heads `d` wide, a multiple of 32."""
    return {
        "forward": gpu_forward.shape(d, size["block_q"], size["block_k"]),
        "backward_q": gpu_backward.shape(d, size["block_q"]),
        "backward_kv": gpu_backward.shape(d, size["block_k"]),
    }


def memory(d: int, size: dict[str, int]) -> tuple[int, int]:
    """Shared memory of a block of threads forward, and at most backward, bytes."""
    d = _up(d, 32)
    of = {name: smem_bytes(d, shape, 1 if name == "forward" else 2) for name, shape in shapes(d, size).items()}
    return of["forward"], max(of["backward_q"], of["backward_kv"])


@dataclass(frozen=True)
class Plan:
    """A `Spec` per kernel."""

    forward: Spec
    backward_q: Spec
    backward_kv: Spec
    n_queries: int


def _there(x: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
    return {name: a for name, a in x.items() if a is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    plan: Plan, x: dict[str, jax.Array | None], rows: Rows, tables: dict[str, Table]
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, H, T]`` of padded ``q, k, v, slopes, sinks``.

    `rows`: numbers per token ``[B, T]`` and ``[B, S]``; `tables`: a `table.runs` per kernel.
    """
    return gpu_forward.forward(plan.forward, _there(x) | rows | tables["forward"])


def _fwd(plan: Plan, x: dict[str, jax.Array | None], rows: Rows, tables: dict[str, Table]) -> Any:
    out, lse = attention(plan, x, rows, tables)
    return (out, lse), (x, rows, tables, out, lse)


def _bwd(plan: Plan, saved: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> Any:
    x, rows, tables, out, lse = saved
    d_out, d_lse = cotangents
    # d logit = p * (dO . v - sum(dO * O) + dLSE)
    shift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - d_lse
    part = (lse > NEG / 2) & (jnp.arange(lse.shape[-1]) < plan.n_queries)
    safe = jnp.where(part, lse, FAR)
    given = _there({name: x[name] for name in ("q", "k", "v", "slopes")})
    given |= {"d_out": d_out.astype(jnp.bfloat16), "lse": safe * LOG2E, "shift": shift, **rows}
    sums = per_head.sums(x["slopes"], x["sinks"])
    dq, of_rows = gpu_backward.backward_q(plan.backward_q, given | tables["backward_q"], sums)
    dk, dv = gpu_backward.backward_kv(plan.backward_kv, given | tables["backward_kv"])
    heads = per_head.gradients(of_rows, x["sinks"], safe, shift, d_lse)
    return {"q": dq, "k": dk, "v": dv, **heads}, None, None


attention.defvjp(_fwd, _bwd)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def flash(q: jax.Array, k: jax.Array, v: jax.Array, scores: Scores, how: How = AUTO) -> tuple[jax.Array, jax.Array]:
    """What `api.flash` calls. Lengths are padded to whole blocks, head widths to multiples of 32."""
    (B, T, _, width), S = q.shape, k.shape[1]
    size, slopes, sinks = how.blocks("flash", how.hopper), scores.slopes_H, scores.sinks_H
    d = _up(width, 32)
    long = {"q": _up(T, 128), "k": _up(S, 128)}  # a multiple of every block
    plans, lists = {}, {}
    for name, shape in shapes(d, size).items():
        major = int(name == "backward_kv")
        block_q, block_k = (shape.stream, shape.rows) if major else (shape.rows, shape.stream)
        n_q, n_k = long["q"] // block_q, long["k"] // block_k
        listed = scores.listed((T, S), (block_q, block_k), (n_q, n_k))
        lists[name], kinds = tables(listed, (n_q, n_k)[major], major)
        plans[name] = Spec(
            mask=scores.mask,
            shape=shape,
            kinds=kinds,
            n_keys=S,
            offset=scores.offset,
            scale=scores.scale,
            softcap=scores.softcap,
            sloped=slopes is not None,
            interpret=bool(how.interpret),
        )

    def padded(name: str, a: jax.Array, fill: int = 0) -> jax.Array:
        pads = [(0, 0), (0, long[name[0]] - a.shape[1])]
        pads += [(0, 0), (0, d - width)] if a.ndim == 4 else []
        return jnp.pad(a, pads, constant_values=fill)

    numbers = {
        name: padded(name, jnp.broadcast_to(a, (B, a.shape[-1])), -1 if name.endswith("index") else 0)
        for name, a in scores.rows.items()
    }
    x: dict[str, jax.Array | None] = {"q": padded("q", q), "k": padded("k", k), "v": padded("k", v)}
    heads = {name: None if a is None else a.astype(jnp.float32) for name, a in (("slopes", slopes), ("sinks", sinks))}
    out, lse = attention(Plan(**plans, n_queries=T), x | heads, numbers, lists)
    return out[:, :T, :, :width], lse[:, :, :T].swapaxes(1, 2)
