"""`flash`: one softmax over the keys a mask leaves, on the implementation that fits the platform."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import common
from kernels_pallas.flash import cudnn, gpu, reference, table, tpu
from kernels_pallas.flash.tpu import Spec
from lm.errors import UserError

NAME = "flash"


def flash(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    mask: Any,
    *,
    tiles: Any = None,
    index: tuple[jax.Array, jax.Array] | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    positions: tuple[jax.Array, jax.Array] | None = None,
    slopes_H: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    offset: int = 0,
    causal: bool = False,
    block_q: int | None = None,
    block_k: int | None = None,
    chip: str | None = None,
    implementation: str = "auto",
    interpret: Any = True,
    mesh: Any = None,
    batch_axis: Any = "data",
    head_axis: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]``, both differentiable; H is a multiple of K.

    ``logit = softcap(scale q.k - slope_h (q_position - k_position))`` where ``mask(q_index, k_index)`` holds (hashable,
    traceable on int32 arrays), both indices are >= 0 and the segments agree; scale defaults to ``d ** -0.5`` (a
    temperature divides it). `sinks_H`: one more logit per head that takes part in the denominator and has no value. A
    row without keys gives 0 and `NEG` (with sinks: 0 and the sink).

    `index`: int32 ``[B, T]``, ``[B, S]``, negative = padding; None = ``offset + 0, 1, …`` and ``0, 1, …``. `segments`
    int32 and `positions` float32 alike; slopes need positions, which get no gradient. `tiles`: callable
    ``(n_queries, n_keys, block_q, block_k) -> int32 [n, 3]`` of (query block, key block, whole), the only ones visited;
    whole = every pair is visible but for segments. None = all tiles, mask evaluated in each.

    `causal` says that the mask is plain causal, for library kernels. `implementation`: see `kernels_pallas.common`;
    `interpret`: what `pallas_call` takes under 'interpret' (`common.strict`). `chip`: row of the block-size table;
    `block_q`, `block_k` win over it. With `mesh` the call sits in `jax.shard_map`: rows of the batch over `batch_axis`,
    heads over `head_axis` (a name, several, or None). 'xla' and 'reference' hold all logits, O(T S) per head. 'cudnn'
    rounds the log-sum-exp to the dtype of q.
    Raises UserError for shapes that do not fit each other, and for an implementation that cannot serve.
    """
    common.check_chip(NAME, chip)
    B, T, H, d = q_BTHd.shape
    S, K = k_BSKd.shape[1:3]
    if H % K:
        raise UserError(f"{NAME}: {H} query heads and {K} key heads; valid: a multiple of the key heads")
    if slopes_H is not None and positions is None:
        raise UserError(f"{NAME}: slopes_H without positions; valid: both")
    scale = d**-0.5 if scale is None else float(scale)
    rows: dict[str, jax.Array] = {}
    pairs = {"index": index, "segments": segments, "positions": positions if slopes_H is not None else None}
    for key, pair in pairs.items():
        if pair is not None:
            rows |= {f"q_{key}": pair[0], f"k_{key}": pair[1]}
    if "q_positions" in rows:
        rows |= {key: jax.lax.stop_gradient(rows[key]) for key in ("q_positions", "k_positions")}
    size = common.blocks(NAME, chip, block_q=block_q, block_k=block_k)
    size = {"block_q": min(size["block_q"], _up(T, table.LANES)), "block_k": min(size["block_k"], _up(S, table.LANES))}
    uneven = any(s % table.LANES for s in size.values()) and implementation != "interpret"
    refusal = f"blocks {size}, on a TPU multiples of {table.LANES}" if uneven else None
    refusals = {"tpu": refusal, "interpret": refusal}
    on_gpu = common.blocks(NAME, chip if chip in common.GPUS else "h100", block_q=block_q, block_k=block_k)
    refusals["gpu"] = refusals["interpret_gpu"] = gpu.refusal(q_BTHd, k_BSKd, v_BSKd, on_gpu)
    refusals["cudnn"] = cudnn.refusal(q_BTHd, k_BSKd, causal, rows, slopes_H, sinks_H, softcap)

    def local(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        spec = Spec(
            mask, size["block_q"], size["block_k"], T, S, offset, scale, softcap, common.vmem(chip), interpret=False
        )
        settings = {"offset": offset, "scale": scale, "softcap": softcap}
        mosaic = functools.partial(gpu.flash, mask, tiles, on_gpu, (T, S), settings)
        dense = functools.partial(reference.attention, mask=mask, offset=offset, scale=scale, softcap=softcap)
        forms: dict[str, Callable[..., Any]] = {
            "tpu": functools.partial(_tpu, spec, tiles),
            "interpret": functools.partial(_tpu, dataclasses.replace(spec, interpret=interpret), tiles),
            "gpu": functools.partial(mosaic, False),
            "interpret_gpu": functools.partial(mosaic, True),
            "cudnn": functools.partial(cudnn.attention, scale=scale),
            "xla": jax.checkpoint(dense),  # nothing of size T S waits for the backward pass
            "reference": functools.partial(_exact, dense),
        }
        return common.run(NAME, implementation, forms, refusals, *arrays, chip=chip)

    args = (q_BTHd, k_BSKd, v_BSKd, rows, slopes_H, sinks_H)
    if mesh is None:
        return local(*args)
    P = jax.sharding.PartitionSpec
    tokens, per_row, per_head = P(batch_axis, None, head_axis), P(batch_axis), P(head_axis)
    specs = (tokens, tokens, tokens, {key: per_row for key in rows}, per_head, per_head)
    # One array for all rows of the batch is one row per device here.
    rows = {key: jnp.broadcast_to(a, (B, a.shape[-1])) for key, a in rows.items()}
    return common.mapped(local, mesh, specs, (tokens, tokens))(*args[:3], rows, slopes_H, sinks_H)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _exact(dense: Any, q: jax.Array, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """All of it in float32, the output rounded at the end."""
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, (q, *arrays))
    out, lse = dense(*exact)
    return out.astype(q.dtype), lse


def _tpu(
    spec: Spec, tiles: Any, q: Any, k: Any, v: Any, rows: dict[str, jax.Array], slopes: Any, sinks: Any
) -> tuple[jax.Array, jax.Array]:
    """Heads lead and lengths are padded to whole blocks; the kernel; and back."""
    B, T, S = q.shape[0], spec.n_queries, spec.n_keys
    n_q, n_k = -(-T // spec.block_q), -(-S // spec.block_k)
    if tiles is None:
        listed = np.array([(i, j, 0) for i in range(n_q) for j in range(n_k)], np.int32)
    else:
        listed = np.asarray(tiles(T, S, spec.block_q, spec.block_k), np.int32).reshape(-1, 3)
    tables = tuple(jnp.asarray(table.pack(listed, n, major)) for major, n in enumerate((n_q, n_k)))
    long = {"q": n_q * spec.block_q, "k": n_k * spec.block_k}

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
        None if slopes is None else slopes.astype(jnp.float32),
        None if sinks is None else sinks.astype(jnp.float32),
        {name: row(name, a) for name, a in rows.items()},
        tables,
    )
    return out[:, :, :T].swapaxes(1, 2), lse[:, :, :T].swapaxes(1, 2)
