"""`block_table`: one softmax over key blocks that are listed per row, head and query block while the program runs.

What LongHeads (arXiv 2402.10685), InfLLM (2402.04617) and LServe (2502.14866) need once their blocks are chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_table import gpu, reference, tpu
from kernels_pallas.common import CHIPS, check_chip, known_dtype, mapped, run
from lm.errors import UserError

NAME = "block_table"
Static = tuple[str, str | None, tuple[tuple[str, int | None], ...], Any, tuple[tuple[str, Any], ...]]


def block_table(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    *,
    block_size: int,
    q_block: int = 1,
    positions: jax.Array | None = None,
    lengths: jax.Array | None = None,
    turn: jax.Array | None = None,
    angles: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    heads_lead: bool = False,
    implementation: str = "auto",
    chip: str | None = None,
    entries: int | None = None,
    kib: int | None = None,
    tile: int | None = None,
    stages: int | None = None,
    fill: int | None = None,
    interpret: Any = True,
    mesh: Any = None,
    batch_axis: Any = "data",
    head_axis: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, d] as `q` and log-sum-exp float32 [B, T, H] of queries over the keys their lists name.

    q [B, T, H, d]; k, v [B, S, K, d] with K a divisor of H. A TPU reads a block in one piece only where heads lead:
    with `heads_lead`, k and v are [B, K, S, d]; without it they are copied into that order, all of them, at every call.

    `blocks` int32 [B, H or K, ceil(T / q_block), n]: queries ``i * q_block …`` see keys ``id * block_size …`` of each
    id they list. With K lists the heads of a key head share one. Negative ids are empty entries. A block that is listed
    twice counts once, at its first entry. Ids past the last block are refused where their values are known, and empty
    inside a compiled program.

    `positions` int32 [B, T]: the last slot a query may see, its own for causal attention, one less to leave that out,
    negative for nothing; None = the last T of the row's slots. `lengths` int32 [B]: slots in use, others may hold
    anything; None = all S. A query that sees nothing has output 0 and log-sum-exp -inf.

    `angles` float32 [P, m], m at most d / 2, and `turn` int32 like `blocks`, rows of `angles`: for entry j a query's
    pairs ``(i, i + m)`` of channels turn by ``angles[turn[..., j], i]`` more. With keys rotated to places of their own
    and ``angles = shifts * inverse frequencies`` every listed block takes a new place: a key cannot tell whether it
    came nearer or the query did. Turned queries are rounded to the dtype of `q`.

    `scale` of the scores, 1 / sqrt(d) if None; `softcap` c: ``c tanh(score / c)``. Gradients reach q, k and v through
    both results, by the XLA form: the kernel has no backward pass. `chip`: row of `kernels_pallas.common.BLOCKS`;
    `entries` of a grid step and `kib` of scalar memory for the lists of one call (TPU), keys of a `tile`, `stages` and
    `fill` (GPU) win over it. `implementation`, `interpret`, `mesh`, `batch_axis`, `head_axis`: as in
    `kernels_pallas.flash.api.flash`; lists follow the heads.
    Raises UserError for shapes, dtypes or ids that do not fit, and for an implementation that cannot serve.
    """
    check_chip(NAME, chip)
    known_dtype(NAME, q=q, k=k, v=v)
    if q.ndim != 4 or k.ndim != 4:
        raise UserError(f"{NAME}: q {q.shape}, k {k.shape}; valid: q [B, T, H, d], k [B, S, K, d]")
    if not heads_lead:
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2) if v.ndim == 4 else v
    _check_shapes(q, k, v, blocks, block_size, q_block)
    B, T, _, d = q.shape
    S = k.shape[2]
    _check_turns(blocks, turn, angles, d)
    sizes = {"entries": entries, "kib": kib, "tile": tile, "stages": stages, "fill": fill}
    for name, given in sizes.items():
        least = 16 if name == "tile" else 1
        if given is not None and given < least:
            raise UserError(f"{NAME}: {name} {given}; valid: at least {least}{' KiB' if name == 'kib' else ''}")
    lengths = _integers("lengths", lengths, (B,), jnp.full((B,), S, jnp.int32))
    own = jnp.minimum(lengths, S)[:, None] - T + jnp.arange(T, dtype=jnp.int32)
    positions = _integers("positions", positions, (B, T), own)
    settings = {
        "block_size": block_size,
        "q_block": q_block,
        "scale": d**-0.5 if scale is None else float(scale),
        "softcap": softcap,
    }
    static = (implementation, chip, tuple(sizes.items()), interpret, tuple(settings.items()))
    args = (q, k, v, blocks, positions, lengths, turn, angles)
    if mesh is None:
        return _attend(static, *args)
    P = jax.sharding.PartitionSpec
    tokens, lead = P(batch_axis, None, head_axis), P(batch_axis, head_axis)
    lists, per_row = lead, P(batch_axis)
    specs = (
        tokens,
        lead,
        lead,
        lists,
        per_row,
        per_row,
        None if turn is None else lists,
        None if turn is None else P(),
    )
    local = functools.partial(_attend, static)
    return mapped(local, mesh, specs, (tokens, tokens))(*args)


def _check_shapes(q: Any, k: Any, v: Any, blocks: Any, block_size: int, q_block: int) -> None:
    """Shapes with the heads of `k` and `v` in front; ids where they are known."""
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    if k.shape != (B, K, S, d) or v.shape != k.shape or not K or H % K or not S or not T:
        raise UserError(
            f"{NAME}: q {q.shape}, heads-first k {k.shape} and v {v.shape}; valid: k and v alike, {B} rows, width {d}, "
            f"key heads a divisor of {H}, at least one key and query"
        )
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
    ends = _known(blocks)
    if ends and ends[1] >= N:
        raise UserError(f"{NAME}: block {ends[1]} of {N}; valid: 0 to {N - 1}, or negative for none")


def _known(ids: Any) -> tuple[int, int] | None:
    """The least and the largest, where they are known before the program runs."""
    if isinstance(ids, jax.core.Tracer):
        return None
    values = np.asarray(ids)
    return int(values.min()), int(values.max())


def _check_turns(blocks: Any, turn: Any, angles: Any, d: int) -> None:
    if (turn is None) != (angles is None):
        raise UserError(
            f"{NAME}: {'angles without turn' if turn is None else 'turn without angles'}; valid: both or none"
        )
    if turn is None:
        return
    if turn.shape != blocks.shape or turn.dtype != jnp.int32:
        raise UserError(f"{NAME}: turn {turn.dtype}{list(turn.shape)}; valid: int32 {list(blocks.shape)}, as blocks")
    if angles.ndim != 2 or not 1 <= angles.shape[1] <= d // 2 or not angles.shape[0] or angles.dtype != jnp.float32:
        raise UserError(f"{NAME}: angles {angles.dtype}{list(angles.shape)}; valid: float32 [P, 1 to {d // 2}]")
    ends = _known(turn)
    if ends and not 0 <= ends[0] <= ends[1] < angles.shape[0]:
        raise UserError(f"{NAME}: turns {ends[0]} to {ends[1]}; valid: rows of angles, 0 to {angles.shape[0] - 1}")


def _integers(name: str, given: Any, shape: tuple[int, ...], default: jax.Array) -> jax.Array:
    if given is None:
        return default
    if given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
        raise UserError(f"{NAME}: {name} {given.dtype}{list(given.shape)}; valid: integers {list(shape)}")
    return jnp.asarray(given, jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, *args: Any) -> tuple[jax.Array, jax.Array]:
    implementation, chip, given, interpret, items = static
    settings: dict[str, Any] = dict(items)
    sizes: dict[str, Any] = dict(given)
    q, k, _, blocks, *_, angles = args
    w, q_block = settings["block_size"], settings["q_block"]
    on_tpu = {name: sizes.pop(name) for name in ("entries", "kib")}
    kernel = functools.partial(tpu.attention, **settings, chip=chip if chip in CHIPS else None, **on_tpu)
    hopper = functools.partial(gpu.attention, **settings, chip=chip, **sizes)
    forms: dict[str, Callable[..., Any]] = {
        "reference": functools.partial(reference.reference, **settings),
        "xla": functools.partial(reference.xla, **settings),
        "tpu": kernel,
        "interpret": functools.partial(kernel, interpret=interpret),
        "gpu": hopper,
        "interpret_gpu": functools.partial(hopper, interpret=True),
    }
    refusal = tpu.refusal(q, k, blocks.shape[1], w, q_block, angles, tiled=implementation != "interpret")
    on_gpu = gpu.refusal(q, k, blocks.shape, w, q_block, angles, chip, **sizes)
    refusals = {"tpu": refusal, "interpret": refusal, "gpu": on_gpu, "interpret_gpu": on_gpu}
    return run(NAME, implementation, forms, refusals, *args, chip=chip)


def _forward(static: Static, *args: Any) -> Any:
    return _attend(static, *args), args


def _backward(static: Static, args: Any, cotangents: Any) -> Any:
    _, pull = jax.vjp(lambda q, k, v: reference.xla(q, k, v, *args[3:], **dict(static[-1])), *args[:3])
    return (*pull(cotangents), *(None,) * (len(args) - 3))


_attend.defvjp(_forward, _backward)
