"""Attention of a tree of draft tokens against a long cache, for speculative decoding (SpecInfer, arXiv 2305.09781)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import check_chip, known_dtype, run
from kernels_pallas.tree_decode import gpu, reference, tpu
from lm.errors import UserError

NAME = "tree_decode"
NODES = 256


def _check(q: Any, k: Any, v: Any, lengths: Any, new_k: Any, new_v: Any, ancestors: Any, tile_s: int | None) -> None:
    known_dtype(NAME, q=q, k=k, v=v, new_k=new_k, new_v=new_v)
    if q.ndim != 4 or k.ndim != 4:
        raise UserError(f"{NAME}: q {q.shape}, k {k.shape}; valid: q [B, N, H, d], k [B, K, S, d]")
    B, N, H, d = q.shape
    K, S = k.shape[1:3]
    if k.shape != (B, K, S, d) or v.shape != k.shape or H % K or not S:
        raise UserError(
            f"{NAME}: q {q.shape}, k {k.shape}, v {v.shape}; valid: k and v [{B}, K, S, {d}], K a divisor of {H}"
        )
    if not 1 <= N <= NODES:
        raise UserError(f"{NAME}: {N} nodes; valid: 1 to {NODES}")
    if new_k.shape != (B, N, K, d) or new_v.shape != (B, N, K, d):
        raise UserError(f"{NAME}: new_k {new_k.shape}, new_v {new_v.shape}; valid: {(B, N, K, d)}")
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise UserError(f"{NAME}: lengths {lengths.dtype}{list(lengths.shape)}; valid: an integer per row, [{B}]")
    packed = ancestors.dtype == jnp.uint32
    width = -(-N // 32) if packed else N
    if ancestors.shape not in ((N, width), (1, N, width), (B, N, width)) or not (
        packed or ancestors.dtype == jnp.bool_
    ):
        raise UserError(
            f"{NAME}: ancestors {ancestors.dtype}{list(ancestors.shape)}; valid: bool [{N}, {N}] or uint32 [{N}, "
            f"{-(-N // 32)}], or one for each of {B} rows"
        )
    if tile_s is not None and (tile_s < 128 or tile_s % 128):
        raise UserError(f"{NAME}: tile_s {tile_s}; valid: a multiple of 128")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(static: tuple[str, str | None, int | None, float], *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    implementation, chip, tile_s, scale = static
    kernel = functools.partial(tpu.tree_decode, scale=scale, chip=chip, tile_s=tile_s)
    hopper = functools.partial(gpu.tree_decode, scale=scale, tile_s=tile_s)
    forms: dict[str, Callable[..., Any]] = {
        "reference": functools.partial(reference.reference, scale=scale),
        "xla": functools.partial(reference.xla, scale=scale),
        "tpu": kernel,
        "gpu": hopper,
        "interpret": functools.partial(kernel, interpret=True),
        "interpret_gpu": functools.partial(hopper, interpret=True),
    }
    on_tpu, on_gpu = tpu.refusal(arrays[0], arrays[1]), gpu.refusal(arrays[0], arrays[1], tile_s)
    refusals = {"tpu": on_tpu, "interpret": on_tpu, "gpu": on_gpu, "interpret_gpu": on_gpu}
    return run(NAME, implementation, forms, refusals, *arrays, chip=chip)


@_attend.defjvp
def _refuse(static: Any, primals: Any, tangents: Any) -> Any:
    raise UserError(f"{NAME}: it has no gradient; valid: inference, or jax.lax.stop_gradient around its inputs")


def tree_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    new_k: jax.Array,
    new_v: jax.Array,
    ancestors: jax.Array,
    *,
    scale: float | None = None,
    implementation: str = "auto",
    chip: str | None = None,
    tile_s: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Every node attends to its row's cache and to its ancestors -> output [B, N, H, d], log-sum-exp f32 [B, N, H].

    q [B, N, H, d]: 1 to 256 nodes, rotated. k, v [B, K, S, d]: the cache, of which the first `lengths` [B] slots are
    valid (more than S counts as S); other slots may hold anything. new_k, new_v [B, N, K, d]: of the nodes, not in the
    cache yet. ancestors: bool [N, N], row i marks the nodes i sees, itself among them (``reference.ancestors_of``), or
    the same as bits, uint32 [N, ceil(N / 32)] (``reference.pack_mask``); with a leading B, one for each row. A node
    that sees nothing has output 0 and log-sum-exp -inf. `scale`: of the scores, 1 / sqrt(d) if None. `tile_s` and
    `chip` choose the slots per grid step (`kernels_pallas.common.BLOCKS`).
    Raises UserError for shapes or dtypes that do not fit each other, for an implementation that cannot serve, and when
    differentiated.
    """
    check_chip(NAME, chip)
    _check(q, k, v, lengths, new_k, new_v, ancestors, tile_s)
    mask = reference.unpack_mask(ancestors) if ancestors.dtype == jnp.uint32 else ancestors
    mask = mask if mask.ndim == 3 else mask[None]
    static = (implementation, chip, tile_s, q.shape[-1] ** -0.5 if scale is None else float(scale))
    return _attend(static, q, k, v, lengths, new_k, new_v, mask)
